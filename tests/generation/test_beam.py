"""Beam search against exhaustive search, a reference without cache, transformers and KerasHub."""

import itertools
import json

import keras_hub
import numpy as np
import pytest
from keras import ops, saving

import keras_gemma
from keras_gemma import samplers
from keras_gemma.causal_lm.model import GemmaCausalLM
from keras_gemma.generation import prefill
from keras_gemma.generation.strategies import beam
from keras_gemma.model.backbone import GemmaBackbone
from keras_gemma.samplers import BeamSampler
from tests.configurations import CONFIGURATIONS
from tests.models import compile_lm, logits_of, make_lm, on_torch
from tests.parity.pairs import load_into_transformers
from tests.storage.transformers_models import make_transformers_model

PROMPTS = [[2, 9, 31], [2, 400, 3, 17, 60, 5, 6]]
NEW = 8


def last_logits(lm, texts, shape=(4, 32)):
    """Returns the last logits of ragged texts, computed without a cache: float64 `[B, V]`."""
    padded = np.zeros(shape, "int32")  # one shape compiles once
    for row, ids in zip(padded, texts, strict=False):
        row[: len(ids)] = ids
    logits = ops.convert_to_numpy(lm.score(padded)).astype("float64")
    return np.array([row[len(ids) - 1] for row, ids in zip(logits, texts, strict=False)])


def log_softmax(logits):
    return logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()


def reference_search(
    lm, prompt, beams, room=NEW, stops=(), length_penalty=0.0, temperature=1.0, change=None
):
    """Returns new ids and scores of a beam search in Python over all candidates, best first."""

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
            gains = log_softmax(logits / temperature)
            candidates += [([*ids, i], total + gains[i], i in stops) for i in range(len(gains))]
        running = sorted(candidates, key=score, reverse=True)[:beams]
    return [(text[0][len(prompt) :], score(text)) for text in running]


def search(lm, sampler, prompts=PROMPTS, new=NEW, **settings):
    """Returns new ids and scores of every beam of each prompt."""
    settings = {"stop_token_ids": None, "return_logprobs": True, **settings}
    answers = lm.generate(prompts, max_new_tokens=new, sampler=sampler, **settings)
    return [[(text.token_ids, text.score) for text in answer] for answer in answers]


def assert_same(actual, expected):
    assert [ids for ids, _ in actual] == [ids for ids, _ in expected]
    scores = [[score for _, score in texts] for texts in (actual, expected)]
    np.testing.assert_allclose(*scores, rtol=1e-4)


@pytest.fixture(scope="module")
def grouped():
    """A model with ring buffers of 4 slots in every other layer."""
    return make_lm("gemma2_grouped")


@pytest.fixture(scope="module")
def frequent(lm):
    """Stop tokens that end some beams early and others late."""
    beams = search(lm, BeamSampler(4, return_all_beams=True))
    return sorted({beams[0][0][0][2], beams[0][2][0][5], beams[1][1][0][6], beams[1][0][0][3]})


def test_one_beam_is_greedy(lm, grouped):
    for model in (lm, grouped):
        settings = {"max_new_tokens": NEW, "stop_token_ids": [7]}
        greedy = model.generate(PROMPTS, **settings)
        assert model.generate(PROMPTS, sampler=BeamSampler(1), **settings) == greedy


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0, -0.5])
def test_against_reference(lm, frequent, length_penalty):
    sampler = BeamSampler(4, return_all_beams=True, length_penalty=length_penalty)
    actual = search(lm, sampler, stop_token_ids=frequent)
    lengths = {len(ids) for texts in actual for ids, _ in texts}
    assert length_penalty or len(lengths) > 2
    for prompt, texts in zip(PROMPTS, actual, strict=True):
        expected = reference_search(lm, prompt, 4, stops=frequent, length_penalty=length_penalty)
        assert_same(texts, expected)


def test_rings_and_growing_caches(grouped, monkeypatch):
    sampler = BeamSampler(3, return_all_beams=True)
    actual = search(grouped, sampler, new=14)
    for prompt, texts in zip(PROMPTS, actual, strict=True):
        assert_same(texts, reference_search(grouped, prompt, 3, room=14))
    monkeypatch.setattr(prefill, "MIN_CACHE_SLOTS", 8)
    for texts, again in zip(actual, search(grouped, sampler, new=14), strict=True):
        assert_same(again, texts)


def test_prompts_are_independent(lm, frequent):
    sampler = BeamSampler(3, return_all_beams=True, length_penalty=0.5)
    new = [3, NEW]
    together = search(lm, sampler, new=new, stop_token_ids=frequent)
    for prompt, room, texts in zip(PROMPTS, new, together, strict=True):
        (alone,) = search(lm, sampler, [prompt], room, stop_token_ids=frequent)
        assert_same(texts, alone)


def test_settings_per_prompt(lm, frequent):
    prompts, settings = [PROMPTS[0]] * 2, {"stop_token_ids": frequent}
    both = BeamSampler(4, True, length_penalty=[0.0, 2.0], temperature=[1.0, 0.7])
    actual = search(lm, both, prompts, **settings)
    assert actual[0] != actual[1]
    for texts, penalty, temperature in zip(actual, (0.0, 2.0), (1.0, 0.7), strict=True):
        expected = reference_search(
            lm,
            prompts[0],
            4,
            stops=frequent,
            length_penalty=penalty,
            temperature=temperature,
        )
        assert_same(texts, expected)


def test_repetition_penalty_and_logits_processors(lm):
    def only_even(ids, logits):
        return ops.where(ops.arange(logits.shape[-1]) % 2 == 0, logits, -np.inf)

    def change(ids, logits):
        seen = np.isin(np.arange(len(logits)), ids)
        logits = np.where(seen, np.where(logits > 0, logits / 1.5, logits * 1.5), logits)
        return np.where(np.arange(len(logits)) % 2 == 0, logits, -1e30)

    sampler = BeamSampler(3, return_all_beams=True)
    actual = search(lm, sampler, repetition_penalty=1.5, logits_processors=[only_even])
    for prompt, texts in zip(PROMPTS, actual, strict=True):
        assert_same(texts, reference_search(lm, prompt, 3, change=change))


def make_small_lm():
    """Returns a model with four tokens, so that all texts can be listed, and its configuration."""
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
    """Returns every continuation of up to `room` tokens with its score, best first."""
    scored, ended = [], [()]
    for length in range(room):
        growing = [ids for ids in ended if stop not in ids] if length else [()]
        totals = dict(scored)
        logits = last_logits(lm, [prompt + list(ids) for ids in growing], (27, 8))
        scored = [(ids, total) for ids, total in scored if stop in ids]
        for ids, row in zip(growing, logits, strict=True):
            gains = log_softmax(row)
            scored += [((*ids, i), totals.get(ids, 0.0) + gains[i]) for i in range(4)]
        ended = [ids for ids, _ in scored]
    scored = [(list(ids), total / len(ids) ** length_penalty) for ids, total in scored]
    return sorted(scored, key=lambda text: -text[1])


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 3.0])
def test_enough_beams_are_exhaustive(small, length_penalty):
    lm, _ = small
    prompt, room, stop = [2, 3, 0], 4, 1
    expected = all_texts(lm, prompt, room, stop, length_penalty)
    assert len(expected) == 1 + 3 + 9 + 27 * 4
    sampler = BeamSampler(128, return_all_beams=True, length_penalty=length_penalty)
    (actual,) = search(lm, sampler, [prompt], room, stop_token_ids=[stop])
    # There are fewer texts than beams: the other beams are impossible and last.
    assert [score for _, score in actual[len(expected) :]] == [-np.inf] * 7
    assert_same(actual[: len(expected)], expected)
    best = lm.generate(
        [prompt],
        max_new_tokens=room,
        stop_token_ids=[stop],
        sampler=BeamSampler(128, length_penalty=length_penalty),
    )
    assert best == [prompt + expected[0][0]]


def make_theirs(lm, configuration):
    model = make_transformers_model(configuration)
    arrays = {name: weight.numpy() for name, weight in lm.backbone.named_weights().items()}
    load_into_transformers(model, arrays, lm.backbone.config)
    return model


def their_search(model, prompt, **settings):
    import torch

    ids = torch.tensor([prompt])
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = settings.pop("stop", None)
    outputs = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        **settings,
    )
    return outputs.sequences[:, len(prompt) :].tolist(), outputs.sequences_scores.tolist()


def test_transformers(grouped):
    """Without stop tokens, all beams have the same length, and both searches are equal."""
    theirs = make_theirs(grouped, grouped.backbone.config.to_dict())
    sampler = BeamSampler(4, return_all_beams=True, length_penalty=1.0)
    for prompt, actual in zip(PROMPTS, search(grouped, sampler), strict=True):
        expected = their_search(
            theirs,
            prompt,
            num_beams=4,
            num_return_sequences=4,
            length_penalty=1.0,
            max_new_tokens=NEW,
        )
        assert_same(actual, list(zip(*expected, strict=True)))


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_transformers_with_stops(small, length_penalty):
    """Enough beams make both searches exhaustive.

    transformers keeps finished texts apart from its beams; they are beams here.
    """
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
    (actual,) = search(lm, sampler, [prompt], 4, stop_token_ids=[stop])
    assert_same(actual[:20], list(zip(ids, scores, strict=True)))


def test_keras_hub(lm):
    """Without stop tokens and with prompts of equal length, where KerasHub is correct."""
    prompts = [[2, 9, 31, 8], [2, 400, 3, 17]]
    theirs = keras_gemma.to_keras_hub(lm)
    theirs.compile(sampler=keras_hub.samplers.BeamSampler(3))
    token_ids = np.zeros((2, 4 + NEW), "int32")
    token_ids[:, :4] = prompts
    mask = np.arange(4 + NEW)[None] < np.array([[4], [4]])
    outputs = theirs.generate({"token_ids": token_ids, "padding_mask": mask}, stop_token_ids=None)
    expected = ops.convert_to_numpy(outputs["token_ids"]).tolist()
    ours = lm.generate(prompts, max_new_tokens=NEW, stop_token_ids=None, sampler=BeamSampler(3))
    assert ours == expected


def test_scores_match_logprobs(lm, frequent):
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
            for text in completions:
                logits = logits_of(lm, prompt + text.token_ids)[len(prompt) - 1 : -1]
                gains = [log_softmax(row) for row in logits.astype("float64")]
                chosen = [gain[i] for gain, i in zip(gains, text.token_ids, strict=True)]
                np.testing.assert_allclose(text.logprobs, chosen, rtol=1e-4)
                expected = sum(chosen) / len(chosen) ** penalty
                np.testing.assert_allclose(text.score, expected, rtol=1e-4)
                stopped = text.token_ids[-1] in frequent
                assert text.finish_reason == ("stop" if stopped else "length")
                for gain, top in zip(gains, text.top_logprobs, strict=True):
                    assert set(top) == set(np.argsort(gain)[-2:].tolist())


def test_output_structure(lm):
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
    outputs = lm.generate(padded, stop_token_ids=None, sampler=BeamSampler(3))
    assert outputs["token_ids"].tolist() == [beams[0][0]]
    with pytest.raises(ValueError, match="`return_all_beams`"):
        lm.generate(padded, stop_token_ids=None, sampler=BeamSampler(3, return_all_beams=True))


def test_strings(tiny_proto):
    lm = make_lm(proto=tiny_proto)
    beams = lm.generate("To be", max_new_tokens=4, sampler=BeamSampler(2, return_all_beams=True))
    assert len(beams) == 2 and all(text.startswith("To be") for text in beams)
    assert lm.generate("To be", max_new_tokens=4, sampler="beam").startswith("To be")
    refused = {"stop": "x"}, {}
    for settings, generate in zip(refused, (lm.generate, lm.stream), strict=True):
        with pytest.raises(ValueError, match=r"decodes token by token.*BeamSampler"):
            generate("To be", max_new_tokens=4, sampler="beam", **settings)


def test_prefix_does_not_change_the_beams(lm):
    sampler = BeamSampler(3, return_all_beams=True)
    prompts = [PROMPTS[1], [*PROMPTS[1][:5], 8, 9, 10]]
    prefix = lm.prefill(PROMPTS[1][:6])
    cached, expected = search(lm, sampler, prompts, prefix=prefix), search(lm, sampler, prompts)
    for pair in zip(cached, expected, strict=True):
        assert_same(*pair)


def test_settings_and_lengths_do_not_recompile(monkeypatch):
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


def test_serialization_and_keras_hub_sampler(lm):
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
    ("arguments", "message"),
    [
        *(({"num_beams": value}, "`num_beams`") for value in (0, -1, 2.0, True, None, [2, 3])),
        *(({"return_all_beams": value}, "`return_all_beams`") for value in (1, None, "yes")),
        *(({"length_penalty": v}, "`length_penalty`") for v in (None, "1", float("nan"), np.inf)),
        ({"temperature": -1}, "temperature=-1"),
    ],
)
def test_settings_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        BeamSampler(**arguments)


def test_incompatible_settings(lm):
    for settings, message in (
        ({"num_return_sequences": 3}, "num_return_sequences=3, num_beams=2"),
        ({"top_k": 3}, "`top_k` cannot be changed for BeamSampler"),
        ({"draft": "prompt"}, "`draft` needs a sampler"),
        ({"max_new_tokens": 10_000}, "at most 8192 tokens in all"),
    ):
        settings = {"max_new_tokens": 4, "stop_token_ids": None, **settings}
        with pytest.raises(ValueError, match=message):
            lm.generate(PROMPTS, sampler=BeamSampler(2), **settings)


def test_reference_lists_all_texts():
    """Checks `all_texts` itself."""
    lm, _ = make_small_lm()
    texts = all_texts(lm, [2], 2, 1, 0.0)
    pairs = {(1,)} | {pair for pair in itertools.product(range(4), repeat=2) if pair[0] != 1}
    assert {tuple(ids) for ids, _ in texts} == pairs
    np.testing.assert_allclose(sum(np.exp(score) for _, score in texts), 1.0, rtol=1e-5)
