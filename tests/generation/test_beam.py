"""Beam search against exhaustive search, a plain one without a cache, transformers and KerasHub."""

import itertools
import json

import keras_hub
import numpy as np
import pytest
from keras import ops, saving

import keras_gemma
from keras_gemma import samplers
from keras_gemma.causal_lm.model import GemmaCausalLM
from keras_gemma.generation import buckets
from keras_gemma.generation.strategies import beam
from keras_gemma.model.backbone import GemmaBackbone
from keras_gemma.samplers import BeamSampler
from keras_gemma.storage.hugging_face import reader as hugging_face
from tests.configurations import CONFIGURATIONS
from tests.models import compile_lm, logits_of, make_lm, on_torch
from tests.storage.test_hugging_face import make_transformers_model

PROMPTS = [[2, 9, 31], [2, 400, 3, 17, 60, 5, 6]]
NEW = 8


def last_logits(lm, texts, shape=(4, 32)):
    """The forward pass without a cache, of texts that may differ in length: float64 `[B, V]`."""
    padded = np.zeros(shape, "int32")  # one shape, which is compiled once
    for row, ids in zip(padded, texts, strict=False):
        row[: len(ids)] = ids
    logits = ops.convert_to_numpy(lm.score(padded)).astype("float64")
    return np.array([row[len(ids) - 1] for row, ids in zip(logits, texts, strict=False)])


def normalised(logits):
    return logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()


def plain_search(
    lm, prompt, beams, room=NEW, stops=(), length_penalty=0.0, temperature=1.0, change=None
):
    """Beam search over all candidates, in Python: new ids and scores, best first."""

    def score(text):
        ids, total, _ = text
        return total / (len(ids) - len(prompt)) ** length_penalty

    running = [(prompt, 0.0, False)]
    for _ in range(room):
        candidates = []
        every_logits = last_logits(lm, [ids for ids, _, _ in running])
        for text, logits in zip(running, every_logits, strict=True):
            ids, total, ended = text
            if ended:
                candidates.append(text)
                continue
            logits = logits if change is None else change(ids, logits)
            gains = normalised(logits / temperature)
            candidates += [([*ids, i], total + gains[i], i in stops) for i in range(len(gains))]
        running = sorted(candidates, key=score, reverse=True)[:beams]
    return [(text[0][len(prompt) :], score(text)) for text in running]


def search(lm, sampler, prompts=PROMPTS, new=NEW, **settings):
    """New ids and scores of every beam of each prompt."""
    settings = {"stop_token_ids": None, "return_logprobs": True, **settings}
    answers = lm.generate(prompts, max_new_tokens=new, sampler=sampler, **settings)
    return [[(made.token_ids, made.score) for made in answer] for answer in answers]


def assert_same(found, expected):
    assert [ids for ids, _ in found] == [ids for ids, _ in expected]
    scores = [[score for _, score in texts] for texts in (found, expected)]
    np.testing.assert_allclose(*scores, rtol=1e-4)


@pytest.fixture(scope="module")
def grouped():
    """Rings of four slots in every other layer."""
    return make_lm("gemma2_grouped")


@pytest.fixture(scope="module")
def frequent(lm):
    """Tokens that stop some beams early, and others not."""
    beams = search(lm, BeamSampler(4, return_all_beams=True))
    return sorted({beams[0][0][0][2], beams[0][2][0][5], beams[1][1][0][6], beams[1][0][0][3]})


def test_width_one_is_greedy(lm, grouped):
    for model in (lm, grouped):
        settings = {"max_new_tokens": NEW, "stop_token_ids": [7]}
        greedy = model.generate(PROMPTS, **settings)
        assert model.generate(PROMPTS, sampler=BeamSampler(1), **settings) == greedy


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0, -0.5])
def test_a_plain_search_finds_the_same(lm, frequent, length_penalty):
    sampler = BeamSampler(4, return_all_beams=True, length_penalty=length_penalty)
    found = search(lm, sampler, stop_token_ids=frequent)
    lengths = {len(ids) for texts in found for ids, _ in texts}
    assert length_penalty or len(lengths) > 2
    for prompt, texts in zip(PROMPTS, found, strict=True):
        expected = plain_search(lm, prompt, 4, stops=frequent, length_penalty=length_penalty)
        assert_same(texts, expected)


def test_rings_and_growing_caches(grouped, monkeypatch):
    sampler = BeamSampler(3, return_all_beams=True)
    found = search(grouped, sampler, new=14)
    for prompt, texts in zip(PROMPTS, found, strict=True):
        assert_same(texts, plain_search(grouped, prompt, 3, room=14))
    monkeypatch.setattr(buckets, "SMALLEST_CACHE", 8)
    for texts, again in zip(found, search(grouped, sampler, new=14), strict=True):
        assert_same(again, texts)


def test_each_prompt_is_searched_as_if_alone(lm, frequent):
    sampler = BeamSampler(3, return_all_beams=True, length_penalty=0.5)
    new = [3, NEW]
    together = search(lm, sampler, new=new, stop_token_ids=frequent)
    for prompt, room, texts in zip(PROMPTS, new, together, strict=True):
        (alone,) = search(lm, sampler, [prompt], room, stop_token_ids=frequent)
        assert_same(texts, alone)


def test_settings_of_each_prompt(lm, frequent):
    prompts, settings = [PROMPTS[0]] * 2, {"stop_token_ids": frequent}
    both = BeamSampler(4, True, length_penalty=[0.0, 2.0], temperature=[1.0, 0.7])
    found = search(lm, both, prompts, **settings)
    assert found[0] != found[1]
    for texts, penalty, temperature in zip(found, (0.0, 2.0), (1.0, 0.7), strict=True):
        expected = plain_search(
            lm,
            prompts[0],
            4,
            stops=frequent,
            length_penalty=penalty,
            temperature=temperature,
        )
        assert_same(texts, expected)


def test_penalised_repetitions_and_processors(lm):
    def only_even(ids, logits):
        return ops.where(ops.arange(logits.shape[-1]) % 2 == 0, logits, -np.inf)

    def change(ids, logits):
        met = np.isin(np.arange(len(logits)), ids)
        logits = np.where(met, np.where(logits > 0, logits / 1.5, logits * 1.5), logits)
        return np.where(np.arange(len(logits)) % 2 == 0, logits, -1e30)

    sampler = BeamSampler(3, return_all_beams=True)
    found = search(lm, sampler, repetition_penalty=1.5, logits_processors=[only_even])
    for prompt, texts in zip(PROMPTS, found, strict=True):
        assert_same(texts, plain_search(lm, prompt, 3, change=change))


def make_small_lm():
    """Four tokens, of which few texts can be made."""
    configuration = CONFIGURATIONS["gemma2_grouped"] | {"vocabulary_size": 4}
    backbone = GemmaBackbone(**configuration, dtype="float32")
    random = np.random.default_rng(1)
    for weight in backbone.named_weights().values():
        weight.assign(random.normal(0.0, 0.5, weight.shape).astype("float32"))
    lm = GemmaCausalLM(backbone)
    compile_lm(lm)
    return lm, configuration


@pytest.fixture(scope="module")
def small():
    return make_small_lm()


def all_texts(lm, prompt, room, stop, length_penalty):
    """Every text of up to `room` tokens that may follow, with its score, best first."""
    scored, ended = [], [()]
    for length in range(room):
        growing = [ids for ids in ended if stop not in ids] if length else [()]
        totals = dict(scored)
        logits = last_logits(lm, [prompt + list(ids) for ids in growing], (27, 8))
        scored = [(ids, total) for ids, total in scored if stop in ids]
        for ids, row in zip(growing, logits, strict=True):
            gains = normalised(row)
            scored += [((*ids, i), totals.get(ids, 0.0) + gains[i]) for i in range(4)]
        ended = [ids for ids, _ in scored]
    scored = [(list(ids), total / len(ids) ** length_penalty) for ids, total in scored]
    return sorted(scored, key=lambda text: -text[1])


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 3.0])
def test_wide_enough_it_is_exhaustive(small, length_penalty):
    lm, _ = small
    prompt, room, stop = [2, 3, 0], 4, 1
    expected = all_texts(lm, prompt, room, stop, length_penalty)
    assert len(expected) == 1 + 3 + 9 + 27 * 4
    sampler = BeamSampler(128, return_all_beams=True, length_penalty=length_penalty)
    (found,) = search(lm, sampler, [prompt], room, stop_token_ids=[stop])
    # The beams for which there is no text left are impossible, and come last.
    assert [score for _, score in found[len(expected) :]] == [-np.inf] * 7
    assert_same(found[: len(expected)], expected)
    best = lm.generate(
        [prompt],
        max_new_tokens=room,
        stop_token_ids=[stop],
        sampler=BeamSampler(128, length_penalty=length_penalty),
    )
    assert best == [prompt + expected[0][0]]


def make_theirs(lm, configuration):
    import torch

    model = make_transformers_model(configuration)
    places = hugging_face.tensor_specs(lm.backbone.config)
    state = {
        places[key].name: torch.from_numpy(np.array(weight.numpy()))
        for key, weight in lm.backbone.named_weights().items()
    }
    problems = model.load_state_dict(state, strict=False)
    assert problems.unexpected_keys == []
    return model


def their_search(model, prompt, **settings):
    import torch

    ids = torch.tensor([prompt])
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = settings.pop("stop", None)
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        **settings,
    )
    return made.sequences[:, len(prompt) :].tolist(), made.sequences_scores.tolist()


def test_transformers(grouped):
    """Without stops the beams are all of one length, and both searches are the same."""
    theirs = make_theirs(grouped, grouped.backbone.config.to_dict())
    sampler = BeamSampler(4, return_all_beams=True, length_penalty=1.0)
    for prompt, found in zip(PROMPTS, search(grouped, sampler), strict=True):
        expected = their_search(
            theirs,
            prompt,
            num_beams=4,
            num_return_sequences=4,
            length_penalty=1.0,
            max_new_tokens=NEW,
        )
        assert_same(found, list(zip(*expected, strict=True)))


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_transformers_with_stops(small, length_penalty):
    """Theirs keeps ended texts beside the beams, ours among them: wide enough, both find all."""
    lm, configuration = small
    prompt, stop = [2, 3, 0], 1
    ids, scores = their_search(
        make_theirs(lm, configuration),
        prompt,
        stop=stop,
        num_beams=128,
        num_return_sequences=20,
        length_penalty=length_penalty,
        early_stopping="never",
        max_new_tokens=4,
    )
    ids = [row[: row.index(stop) + 1] if stop in row else row for row in ids]
    sampler = BeamSampler(128, return_all_beams=True, length_penalty=length_penalty)
    (found,) = search(lm, sampler, [prompt], 4, stop_token_ids=[stop])
    assert_same(found[:20], list(zip(ids, scores, strict=True)))


def test_keras_hub(lm):
    """Without stops, for one length of prompts, where KerasHub's is right."""
    prompts = [[2, 9, 31, 8], [2, 400, 3, 17]]
    theirs = keras_gemma.to_keras_hub(lm)
    theirs.compile(sampler=keras_hub.samplers.BeamSampler(3))
    token_ids = np.zeros((2, 4 + NEW), "int32")
    token_ids[:, :4] = prompts
    mask = np.arange(4 + NEW)[None] < np.array([[4], [4]])
    made = theirs.generate({"token_ids": token_ids, "padding_mask": mask}, stop_token_ids=None)
    expected = ops.convert_to_numpy(made["token_ids"]).tolist()
    ours = lm.generate(prompts, max_new_tokens=NEW, stop_token_ids=None, sampler=BeamSampler(3))
    assert ours == expected


def test_scores_are_those_of_the_texts(lm, frequent):
    for penalty in (0.0, 1.0):
        sampler = BeamSampler(4, return_all_beams=True, length_penalty=penalty)
        answers = lm.generate(
            PROMPTS,
            max_new_tokens=NEW,
            sampler=sampler,
            stop_token_ids=frequent,
            return_logprobs=2,
        )
        for prompt, completions in zip(PROMPTS, answers, strict=True):
            for made in completions:
                logits = logits_of(lm, prompt + made.token_ids)[len(prompt) - 1 : -1]
                gains = [normalised(row) for row in logits.astype("float64")]
                chosen = [gain[i] for gain, i in zip(gains, made.token_ids, strict=True)]
                np.testing.assert_allclose(made.logprobs, chosen, rtol=1e-4)
                expected = sum(chosen) / len(chosen) ** penalty
                np.testing.assert_allclose(made.score, expected, rtol=1e-4)
                stopped = made.token_ids[-1] in frequent
                assert made.finish_reason == ("stop" if stopped else "length")
                for gain, top in zip(gains, made.top_logprobs, strict=True):
                    assert set(top) == set(np.argsort(gain)[-2:].tolist())


def test_forms_of_the_answer(lm):
    settings = {"max_new_tokens": NEW, "stop_token_ids": None}
    beams = lm.generate(PROMPTS, sampler=BeamSampler(3, return_all_beams=True), **settings)
    assert [len(texts) for texts in beams] == [3, 3]
    assert lm.generate(PROMPTS, sampler=BeamSampler(3), **settings) == [t[0] for t in beams]
    for sampler in (BeamSampler(3), BeamSampler(3, return_all_beams=True)):
        best = lm.generate(PROMPTS, sampler=sampler, num_return_sequences=2, **settings)
        assert best == [texts[:2] for texts in beams]
    token_ids = np.zeros((1, 3 + NEW), "int32")
    token_ids[0, :3] = PROMPTS[0]
    padded = {"token_ids": token_ids, "padding_mask": np.arange(3 + NEW)[None] < 3}
    made = lm.generate(padded, stop_token_ids=None, sampler=BeamSampler(3))
    assert made["token_ids"].tolist() == [beams[0][0]]
    with pytest.raises(ValueError, match="`return_all_beams`"):
        lm.generate(padded, stop_token_ids=None, sampler=BeamSampler(3, return_all_beams=True))


def test_texts(tiny_proto):
    lm = make_lm(proto=tiny_proto)
    beams = lm.generate("To be", max_new_tokens=4, sampler=BeamSampler(2, return_all_beams=True))
    assert len(beams) == 2 and all(text.startswith("To be") for text in beams)
    assert lm.generate("To be", max_new_tokens=4, sampler="beam").startswith("To be")
    refused = {"stop": "x"}, {}
    for settings, generate in zip(refused, (lm.generate, lm.stream), strict=True):
        with pytest.raises(ValueError, match="BeamSampler knows its text only at the end"):
            generate("To be", max_new_tokens=4, sampler="beam", **settings)


def test_a_prefix_changes_nothing(lm):
    sampler = BeamSampler(3, return_all_beams=True)
    begun = [PROMPTS[1], [*PROMPTS[1][:5], 8, 9, 10]]
    prefix = lm.prefill(PROMPTS[1][:6])
    pairs = zip(search(lm, sampler, begun, prefix=prefix), search(lm, sampler, begun), strict=True)
    for found, expected in pairs:
        assert_same(found, expected)


def test_settings_and_lengths_compile_nothing(monkeypatch):
    if on_torch():
        pytest.skip("PyTorch compiles blocks, not programs")
    traced = []
    keep_best = beam.keep_best
    monkeypatch.setattr(
        beam, "keep_best", lambda *args: traced.append(len(args)) or keep_best(*args)
    )
    lm = make_lm()
    search(lm, BeamSampler(3, return_all_beams=True))
    assert len(traced) == 2
    for sampler in (BeamSampler(3, True, 1), BeamSampler(3, True, [0.5, 2.0], 0.7)):
        search(lm, sampler, [[2] * 9, [3]], new=30, stop_token_ids=[4, 5])
    search(lm, BeamSampler(3), num_return_sequences=2)
    assert len(traced) == 2
    search(lm, BeamSampler(2, return_all_beams=True))
    assert len(traced) == 4


def test_a_sampler_as_any_other(lm):
    assert samplers.get("beam") == BeamSampler() == BeamSampler(5, False)
    sampler = BeamSampler(3, True, length_penalty=0.6, temperature=2.0)
    config = json.loads(json.dumps(samplers.serialize(sampler)))
    assert samplers.deserialize(config) == sampler
    assert saving.deserialize_keras_object(saving.serialize_keras_object(sampler)) == sampler
    theirs = keras_hub.samplers.BeamSampler(4, return_all_beams=True, temperature=0.5)
    assert samplers.get(theirs) == BeamSampler(4, True, temperature=0.5)
    compile_lm(lm, sampler=theirs)
    assert lm.sampler == samplers.get(theirs)
    compile_lm(lm)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        *(({"num_beams": value}, "`num_beams`") for value in (0, -1, 2.0, True, None, [2, 3])),
        *(({"return_all_beams": value}, "`return_all_beams`") for value in (1, None, "yes")),
        *(({"length_penalty": v}, "`length_penalty`") for v in (None, "1", float("nan"), np.inf)),
        ({"temperature": -1}, "temperature=-1"),
    ],
)
def test_settings_out_of_range(arguments, says):
    with pytest.raises(ValueError, match=says):
        BeamSampler(**arguments)


def test_settings_that_do_not_go_with_it(lm):
    for settings, says in (
        ({"num_return_sequences": 3}, "num_return_sequences=3, num_beams=2"),
        ({"top_k": 3}, "`top_k` cannot be changed for BeamSampler"),
        ({"draft": "prompt"}, "`draft` needs a rule"),
        ({"max_new_tokens": 10_000}, "no more than the context's"),
    ):
        settings = {"max_new_tokens": 4, "stop_token_ids": None, **settings}
        with pytest.raises(ValueError, match=says):
            lm.generate(PROMPTS, sampler=BeamSampler(2), **settings)


def test_all_lengths_are_met():
    """`all_texts` itself: as many as there are."""
    lm, _ = make_small_lm()
    texts = all_texts(lm, [2], 2, 1, 0.0)
    pairs = {(1,)} | {pair for pair in itertools.product(range(4), repeat=2) if pair[0] != 1}
    assert {tuple(ids) for ids, _ in texts} == pairs
    np.testing.assert_allclose(sum(np.exp(score) for _, score in texts), 1.0, rtol=1e-5)
