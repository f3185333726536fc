"""Contrastive search against a reference without cache, and against KerasHub."""

import json

import keras_hub
import numpy as np
import pytest
from keras import ops

import keras_gemma
from keras_gemma import samplers
from keras_gemma.generation import prefill
from keras_gemma.generation.strategies import contrastive
from keras_gemma.samplers import ContrastiveSampler
from tests.models import compile_lm, make_lm, on_torch

PROMPTS = [[2, 9, 31], [2, 400, 3, 17, 60, 5, 6]]
NEW = 8


def forward(lm, texts, shape=(5, 32)):
    """Returns hidden states after the final norm `[B, T, D]` and logits `[B, T, V]`, uncached."""
    padded = np.zeros(shape, "int32")  # one shape compiles once
    for row, ids in zip(padded, texts, strict=False):
        row[: len(ids)] = ids
    hidden = lm.backbone({"token_ids": padded, "padding_mask": np.ones_like(padded)})
    logits = lm.backbone.token_embedding(hidden, reverse=True)
    return [ops.convert_to_numpy(a).astype("float64")[: len(texts)] for a in (hidden, logits)]


def reference_search(lm, prompt, k, alpha, room=NEW, stops=(), temperature=1.0, change=None):
    """Returns the new ids, from a full forward pass for every candidate."""
    ids = list(prompt)
    while len(ids) < len(prompt) + room and not set(ids[len(prompt) :]) & set(stops):
        logits = forward(lm, [ids])[1][0, len(ids) - 1]
        logits = (logits if change is None else change(ids, logits)) / temperature
        probabilities = np.exp(logits - logits.max())
        probabilities /= probabilities.sum()
        scores = {}
        candidates = np.argsort(-probabilities)[:k].tolist()
        hidden, _ = forward(lm, [[*ids, candidate] for candidate in candidates])
        for candidate, states in zip(candidates, hidden, strict=True):
            states = states[: len(ids) + 1]
            states = states / np.linalg.norm(states, axis=-1, keepdims=True)
            similarity = (states[:-1] @ states[-1]).max()
            scores[candidate] = (1 - alpha) * probabilities[candidate] - alpha * similarity
        ids.append(max(scores, key=scores.get))
    return ids[len(prompt) :]


def search(lm, sampler, prompts=PROMPTS, new=NEW, **settings):
    """Returns the new ids of each prompt."""
    settings = {"stop_token_ids": None, **settings}
    rows = lm.generate(prompts, max_new_tokens=new, sampler=sampler, **settings)
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]


@pytest.fixture(scope="module")
def grouped():
    """A model with ring buffers of 4 slots in every other layer."""
    return make_lm("gemma2_grouped")


def test_alpha_0_is_greedy(lm, grouped):
    for model in (lm, grouped):
        settings = {"max_new_tokens": NEW, "stop_token_ids": [7]}
        greedy = model.generate(PROMPTS, **settings)
        assert model.generate(PROMPTS, sampler=ContrastiveSampler(4, 0), **settings) == greedy


@pytest.mark.parametrize("alpha", [0.2, 0.6, 1.0])
def test_against_reference(lm, alpha):
    actual = search(lm, ContrastiveSampler(k=4, alpha=alpha))
    assert actual != search(lm, "greedy")
    assert actual == [reference_search(lm, prompt, 4, alpha) for prompt in PROMPTS]


def test_stop_tokens_and_maximum_lengths(lm):
    sampler = ContrastiveSampler(k=4)
    first, second = search(lm, sampler)
    assert search(lm, sampler, new=[3, NEW]) == [first[:3], second]
    stop = second[4]
    cut = second[: second.index(stop) + 1]
    assert stop not in first
    assert search(lm, sampler, stop_token_ids=[stop]) == [first, cut]
    assert reference_search(lm, PROMPTS[1], 4, 0.6, stops=[stop]) == cut


def test_rings_chunks_and_growing_caches(grouped, monkeypatch):
    prompts = [list(range(30, 48)), [2, 7]]
    actual = search(grouped, ContrastiveSampler(k=3), prompts, new=12)
    assert actual == [reference_search(grouped, prompt, 3, 0.6, room=12) for prompt in prompts]
    monkeypatch.setattr(prefill, "MIN_CACHE_SLOTS", 8)
    monkeypatch.setattr(prefill, "MAX_CHUNK_TOKENS", 16)
    assert search(grouped, ContrastiveSampler(k=3), prompts, new=12) == actual
    for prompt, row in zip(prompts, actual, strict=True):
        assert search(grouped, ContrastiveSampler(k=3), [prompt], new=12) == [row]


def test_settings_per_prompt(lm):
    prompts = [PROMPTS[0]] * 2
    actual = search(lm, ContrastiveSampler(4, [0.1, 0.9], temperature=[0.5, 2.0]), prompts)
    assert actual[0] != actual[1]
    for row, alpha, temperature in zip(actual, (0.1, 0.9), (0.5, 2.0), strict=True):
        assert row == reference_search(lm, PROMPTS[0], 4, alpha, temperature=temperature)


def test_repetition_penalty_and_logits_processors(lm):
    def only_even(ids, logits):
        return ops.where(ops.arange(logits.shape[-1]) % 2 == 0, logits, -np.inf)

    def change(ids, logits):
        seen = np.isin(np.arange(len(logits)), ids)
        logits = np.where(seen, np.where(logits > 0, logits / 1.5, logits * 1.5), logits)
        return np.where(np.arange(len(logits)) % 2 == 0, logits, -np.inf)

    sampler = ContrastiveSampler(k=4)
    actual = search(lm, sampler, repetition_penalty=1.5, logits_processors=[only_even])
    assert actual == [reference_search(lm, prompt, 4, 0.6, change=change) for prompt in PROMPTS]


def test_keras_hub(grouped):
    prompts = [[2, 9, 31, 8], [2, 400, 3, 17]]
    theirs = keras_gemma.to_keras_hub(grouped)
    theirs.compile(sampler=keras_hub.samplers.ContrastiveSampler(k=4, alpha=0.6))
    token_ids = np.zeros((2, 4 + NEW), "int32")
    token_ids[:, :4] = prompts
    mask = np.arange(4 + NEW)[None] < np.array([[4], [4]])
    outputs = theirs.generate({"token_ids": token_ids, "padding_mask": mask}, stop_token_ids=None)
    expected = ops.convert_to_numpy(outputs["token_ids"])[:, 4:].tolist()
    assert search(grouped, ContrastiveSampler(k=4, alpha=0.6), prompts) == expected


def test_logprobs_and_prefix(lm):
    settings = {"max_new_tokens": NEW, "stop_token_ids": None, "sampler": "contrastive"}
    rows = lm.generate(PROMPTS, return_logprobs=1, **settings)
    for prompt, row in zip(PROMPTS, rows, strict=True):
        _, logits = forward(lm, [prompt + row.token_ids])
        logits = logits[0, len(prompt) - 1 :][:NEW]
        gains = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        np.testing.assert_allclose(row.logprobs, gains[range(NEW), row.token_ids], rtol=1e-4)
        assert [max(top) for top in row.top_logprobs] == gains.argmax(-1).tolist()
        assert row.score is None
    prefix = lm.prefill(PROMPTS[1][:5])
    again = lm.generate(PROMPTS[1:], prefix=prefix, **settings)
    assert again == [PROMPTS[1] + rows[1].token_ids]


def test_more_candidates_than_tokens(lm):
    assert search(lm, ContrastiveSampler(k=600, alpha=0), PROMPTS[:1], 2) == search(
        lm, "greedy", PROMPTS[:1], 2
    )


def test_settings_and_lengths_do_not_recompile(monkeypatch):
    if on_torch():
        pytest.skip("PyTorch compiles blocks, not programs")
    traced = []
    take_best = contrastive.take_best
    monkeypatch.setattr(
        contrastive, "take_best", lambda *args: traced.append(len(args)) or take_best(*args)
    )
    lm = make_lm()
    search(lm, ContrastiveSampler(3))
    for sampler in (ContrastiveSampler(3, 1), ContrastiveSampler(3, [0.5, 1.0], 0.7)):
        search(lm, sampler, [[2] * 9, [3]], new=30, stop_token_ids=[4, 5])
    assert len(traced) == 1
    search(lm, ContrastiveSampler(2))
    assert len(traced) == 2


def test_serialization_and_keras_hub_sampler(lm):
    assert samplers.get("contrastive") == ContrastiveSampler() == ContrastiveSampler(5, 0.6)
    sampler = ContrastiveSampler(3, 0.4, temperature=2.0)
    config = json.loads(json.dumps(samplers.serialize(sampler)))
    assert samplers.deserialize(config) == sampler
    theirs = keras_hub.samplers.ContrastiveSampler(4, 0.3, temperature=0.5)
    compile_lm(lm, sampler=theirs)
    assert lm.sampler == ContrastiveSampler(4, 0.3, temperature=0.5)
    compile_lm(lm)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(({"k": value}, "`k`") for value in (0, -1, 2.0, True, None, [2, 3])),
        *(({"alpha": value}, "`alpha`") for value in (-0.1, 1.1, None, "1", float("nan"))),
        ({"temperature": -1}, "temperature=-1"),
    ],
)
def test_settings_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        ContrastiveSampler(**arguments)


def test_incompatible_settings(lm, tiny_proto):
    for settings, message in (
        ({"num_return_sequences": 3}, "would repeat the same text"),
        ({"top_p": 0.5}, "`top_p` cannot be changed for ContrastiveSampler"),
        ({"draft": "prompt"}, "`draft` needs a sampler"),
    ):
        settings = {"max_new_tokens": 4, "stop_token_ids": None, **settings}
        with pytest.raises(ValueError, match=message):
            lm.generate(PROMPTS, sampler="contrastive", **settings)
    with_text = make_lm(proto=tiny_proto)
    assert with_text.generate("To be", max_new_tokens=4, sampler="contrastive").startswith("To be")
    with pytest.raises(ValueError, match=r"decodes token by token.*ContrastiveSampler"):
        with_text.stream("To be", sampler="contrastive")
