"""Speculative decoding changes neither greedy text nor the distribution of random text."""

import types

import keras
import numpy as np
import pytest

from keras_gemma import samplers
from keras_gemma.causal_lm.model import GemmaCausalLM
from keras_gemma.generation import prefill
from keras_gemma.generation.request import Draft
from keras_gemma.generation.strategies import draft as drafting
from keras_gemma.generation.strategies import speculative
from keras_gemma.generation.strategies.draft import (
    MAX_MATCH_TOKENS,
    MIN_MATCH_TOKENS,
    find_continuation,
)
from keras_gemma.model.backbone import GemmaBackbone
from tests.configurations import CONFIGURATIONS
from tests.models import compile_lm, logits_of, make_backbone, make_lm, on_torch

PROMPTS = [[300], [2, 40, 7], [2, 9, 31, 8, 300, 77, 5, 140, 11]]
"""Shorter and longer than the window of 4."""

REPEATING = [2, *[9, 31, 8, 300, 77] * 3]
NEW = 20


def model(backbone):
    lm = GemmaCausalLM(backbone)
    compile_lm(lm)
    return lm


def near(lm, noise=0.007):
    """Returns a copy of `lm` with noisy weights, which often but not always agrees with it."""
    backbone = GemmaBackbone(**lm.backbone.config.to_dict(), dtype="float32")
    random = np.random.default_rng(9)
    pairs = zip(
        backbone.named_weights().values(), lm.backbone.named_weights().values(), strict=True
    )
    for weight, theirs in pairs:
        value = theirs.numpy()
        weight.assign(value + noise * random.normal(size=value.shape).astype("float32"))
    return model(backbone)


@pytest.fixture(scope="module")
def lm():
    """A model with local layers, whose caches are ring buffers."""
    return make_lm("gemma2_grouped")


@pytest.fixture(scope="module")
def drafts(lm):
    return {
        "itself": lm,
        "near": near(lm),
        "other": model(make_backbone("gemma1_multi_query", seed=5)),
        "text": "prompt",
    }


DRAWN = {"temperature": 1.0, "top_k": 20, "seed": 3}


def generate(lm, prompts=PROMPTS, **settings):
    return lm.generate(prompts, **{"max_new_tokens": NEW, "stop_token_ids": None, **settings})


@pytest.fixture(scope="module")
def texts(lm):
    return generate(lm)


def rates(lm, draft, prompts=PROMPTS, **settings):
    completions = generate(lm, prompts, draft=draft, return_logprobs=True, **settings)
    return [completion.acceptance_rate for completion in completions]


@pytest.mark.parametrize(
    ("name", "tokens"),
    [("itself", None), ("near", None), ("near", np.int64(7)), ("other", 1), ("text", 3)],
)
def test_greedy_text_is_the_same(lm, drafts, texts, name, tokens):
    assert generate(lm, draft=drafts[name], num_draft_tokens=tokens) == texts


def test_rows_are_verified_independently(lm, drafts, texts):
    for prompt, text in zip(PROMPTS, texts, strict=True):
        assert generate(lm, [prompt], draft=drafts["near"]) == [text]


def test_acceptance_rates(lm, drafts):
    assert rates(lm, drafts["itself"]) == [1.0, 1.0, 1.0]
    assert all(0 < rate < 1 for rate in rates(lm, drafts["near"]))
    assert max(rates(lm, drafts["other"])) < 0.2
    assert generate(lm, return_logprobs=True)[0].acceptance_rate is None
    # The first token is not drafted, and no other follows.
    assert rates(lm, drafts["itself"], max_new_tokens=1) == [None] * 3


def test_good_draft_needs_fewer_rounds(lm, drafts, monkeypatch):
    rounds = []

    def count(session, original=speculative.SpeculativeSession._decode_round):
        rounds.append(1)
        original(session)

    monkeypatch.setattr(speculative.SpeculativeSession, "_decode_round", count)
    generate(lm, draft=lm, max_new_tokens=21)  # one token, then five per round
    assert len(rounds) == 4
    rounds.clear()
    generate(lm, draft=drafts["other"], max_new_tokens=21)
    assert 4 < len(rounds) <= 20


@pytest.mark.parametrize("name", ["itself", "near"])
def test_caches_grow(lm, drafts, name, monkeypatch):
    prompts = [*PROMPTS[:2], PROMPTS[2][:7]]  # all accepted, the fifth round ends with the buffer
    expected = generate(lm, prompts, max_new_tokens=40)
    monkeypatch.setattr(prefill, "MIN_CACHE_SLOTS", 32)
    assert generate(lm, prompts, max_new_tokens=40, draft=drafts[name]) == expected


@pytest.mark.parametrize("name", ["itself", "near", "text"])
def test_stop_token_among_accepted_tokens(lm, drafts, texts, name):
    new = [text[len(prompt) :] for prompt, text in zip(PROMPTS, texts, strict=True)]
    for end in range(1, 8):
        stop = new[2][end]
        expected = generate(lm, stop_token_ids=[stop])
        assert len(expected[2]) <= len(PROMPTS[2]) + end + 1 < len(texts[2])
        assert generate(lm, stop_token_ids=[stop], draft=drafts[name]) == expected


@pytest.mark.parametrize("name", ["itself", "near", "text"])
def test_max_new_tokens_reached_among_accepted_tokens(lm, drafts, texts, name):
    for counts in ([1, 7, 3], [2, 1, 8], [6, 20, 5]):
        rows = generate(lm, max_new_tokens=counts, draft=drafts[name])
        expected = zip(texts, PROMPTS, counts, strict=True)
        assert rows == [text[: len(prompt) + count] for text, prompt, count in expected]


def test_prompt_lookup_on_repetitive_text(lm):
    for prompts in ([REPEATING], PROMPTS):
        expected = generate(lm, prompts, max_new_tokens=60)
        assert generate(lm, prompts, max_new_tokens=60, draft="prompt") == expected
        shares = rates(lm, "prompt", prompts, max_new_tokens=60)
        shares = [share for share in shares if share is not None]
        assert 0 < sum(shares) < len(shares)


def brute_force(text, count):
    """Returns the continuation after trying every earlier position and match length."""
    best = (MIN_MATCH_TOKENS - 1, None)
    for end in range(1, len(text)):
        length = 0
        while length < min(end, MAX_MATCH_TOKENS) and text[end - 1 - length] == text[-1 - length]:
            length += 1
        if length >= max(best[0], MIN_MATCH_TOKENS):
            best = (length, end)
    grown = list(text)
    if best[1] is None:
        return []
    for i in range(count):
        grown.append(grown[best[1] + i])
    return grown[len(text) :]


def test_find_continuation_against_brute_force():
    random = np.random.default_rng(0)
    matches = 0
    for length in [*range(1, 12), *[40] * 200]:
        text = random.integers(0, 4, length).astype("int32")
        continuation = find_continuation(text, 6)
        assert continuation.tolist() == brute_force(text, 6)
        matches += len(continuation) > 0
    assert matches > 100
    assert find_continuation(np.array([7] * 20), 3).tolist() == [7, 7, 7]
    assert find_continuation(np.array([5, 6, 7, 8, 5, 6]), 3).tolist() == [7, 8, 5]


def forbid_repeats(ids, logits):
    """Logits processor that depends on the last token, which may be a draft token."""
    ops = keras.ops
    length = ops.sum(ops.cast(ids >= 0, "int32"), axis=1, keepdims=True)
    last = ops.take_along_axis(ids, length - 1, axis=1)
    even = ops.arange(logits.shape[-1], dtype="int32")[None] % 2 == last % 2
    return ops.where(even, logits - 5.0, logits)


@pytest.mark.parametrize("name", ["itself", "near", "text"])
def test_logits_processors_see_draft_tokens(lm, drafts, texts, name):
    settings = {"repetition_penalty": [1.0, 3.0, 0.8], "logits_processors": [forbid_repeats]}
    expected = generate(lm, **settings)
    assert all(row != text for row, text in zip(expected, texts, strict=True))
    assert generate(lm, draft=drafts[name], **settings) == expected
    if name == "itself":
        assert rates(lm, lm, **settings) == [1.0, 1.0, 1.0]


def test_logprobs(lm, drafts):
    plain = generate(lm, return_logprobs=3)
    for draft in (drafts["near"], "prompt"):
        for row, expected in zip(generate(lm, return_logprobs=3, draft=draft), plain, strict=True):
            assert row.token_ids == expected.token_ids
            np.testing.assert_allclose(row.logprobs, expected.logprobs, atol=1e-5)
            for top, expected_top in zip(row.top_logprobs, expected.top_logprobs, strict=True):
                assert list(top) == list(expected_top)


def test_with_prefix_and_several_sequences(lm, drafts, texts):
    prefix = lm.prefill(PROMPTS[2][:6])
    longer = [PROMPTS[2], [*PROMPTS[2][:7], 50]]
    expected = generate(lm, longer)
    assert generate(lm, longer, prefix=prefix, draft=drafts["near"]) == expected
    copies = DRAWN | {"num_return_sequences": 3, "draft": drafts["near"]}
    assert generate(lm, PROMPTS[1:2], **copies | {"temperature": 0.0}) == [[texts[1]] * 3]
    (rows,) = generate(lm, PROMPTS[1:2], **copies)
    assert rows[0] != rows[1] != rows[2]


def test_streams_and_stop_strings(tiny_proto):
    lm = make_lm(proto=tiny_proto)
    prompts = ["to be, or not to be", "the slings"]
    texts = lm.generate(prompts, max_new_tokens=30, stop_token_ids=())
    new = [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]
    for draft in (lm, "prompt"):
        settings = {"max_new_tokens": 30, "stop_token_ids": (), "draft": draft}
        pieces = list(lm.stream(prompts[0], **settings))
        assert "".join(pieces) == new[0]
        rows = list(lm.stream(prompts, **settings))
        assert ["".join(row[i] for row in rows) for i in (0, 1)] == new
        stop = new[0][8:11]
        expected = lm.generate(prompts, max_new_tokens=30, stop_token_ids=(), stop=stop)
        assert expected[0] != texts[0]
        assert lm.generate(prompts, **settings, stop=stop) == expected
    # If all draft tokens are accepted, five tokens follow per round after the first one.
    assert len(list(lm.stream(prompts[0], max_new_tokens=31, stop_token_ids=(), draft=lm))) <= 8


SMALL = CONFIGURATIONS["gemma2_grouped"] | {"vocabulary_size": 6, "num_layers": 2}
ROWS = 3000


@pytest.fixture(scope="module")
def small():
    """A model with six tokens, so that all texts of three tokens can be counted."""
    backbone = make_backbone("gemma2_grouped")
    # The same matrices, with the first six rows of the embedding.
    few = GemmaBackbone(**SMALL, dtype="float32")
    pairs = zip(few.named_weights().values(), backbone.named_weights().values(), strict=True)
    for weight, theirs in pairs:
        value = theirs.numpy()
        weight.assign(value[: weight.shape[0]] if weight.kind == "embedding" else value)
    return model(few)


@pytest.fixture(scope="module")
def small_drafts(small):
    return {"near": near(small, 0.05), "far": near(small, 0.5), "text": "prompt"}


@pytest.fixture
def small_caches(monkeypatch):
    """Small caches, which allow thousands of rows."""
    monkeypatch.setattr(prefill, "MIN_CACHE_SLOTS", 16)


def distribution(lm, prompt, temperature, top_k):
    """Returns the probability of every continuation of three tokens, `[V, V, V]`."""
    size = lm.backbone.config.vocabulary_size

    def after(text):
        logits = logits_of(lm, text)[-1].astype("float64") / temperature
        logits[np.argsort(logits)[: size - top_k]] = -np.inf
        weights = np.exp(logits - logits.max())
        return weights / weights.sum()

    joint = np.zeros((size,) * 3)
    first = after(prompt)
    for a in range(size):
        second = after([*prompt, a])
        for b in range(size):
            joint[a, b] = first[a] * second[b] * after([*prompt, a, b])
    return joint


@pytest.mark.parametrize(
    ("name", "temperature", "top_k"),
    [("near", 1.0, 6), ("near", 0.7, 4), ("far", 0.7, 4), ("text", 0.7, 4)],
)
def test_random_text_follows_the_model(small, small_drafts, small_caches, name, temperature, top_k):
    """Chi-square test of the first three tokens, of which the last two are drafted."""
    prompt = [2, 3, 1, 2, 3, 1, 2]
    expected = distribution(small, prompt, temperature, top_k).ravel()
    settings = {"temperature": temperature, "top_k": top_k, "seed": 5, "max_new_tokens": 4}
    settings |= {"num_return_sequences": ROWS, "draft": small_drafts[name], "num_draft_tokens": 3}
    (rows,) = generate(small, [prompt], **settings)
    texts = np.array(rows)[:, len(prompt) : len(prompt) + 3]
    counts = np.bincount(texts @ [36, 6, 1], minlength=216)
    assert counts[expected == 0].sum() == 0
    common = expected * ROWS >= 5  # the others are counted together
    counts = np.append(counts[common], counts[~common].sum())
    expected = np.append(expected[common], expected[~common].sum()) * ROWS
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = len(counts) - 1
    assert freedom > 20
    # Five standard deviations above the mean; the seed is fixed.
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 5 * np.sqrt(2 * freedom)


def test_acceptance_rate_is_the_overlap_of_the_distributions(small, small_drafts, small_caches):
    """The expected rate is the mean of the sum of min(p, q), here at the first draft token.

    Leviathan et al., 3.1.
    """
    prompt, draft = [2, 3, 1, 2, 3, 1, 2], small_drafts["far"]
    first = distribution(small, prompt, 1.0, 6).sum((1, 2))

    def after(lm, token):
        logits = logits_of(lm, [*prompt, token])[-1].astype("float64")
        return np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()

    shared = sum(
        first[token] * np.minimum(after(small, token), after(draft, token)).sum()
        for token in range(6)
    )
    settings = {"temperature": 1.0, "seed": 5, "max_new_tokens": 2, "return_logprobs": True}
    settings |= {"num_return_sequences": ROWS, "num_draft_tokens": 1}
    (rows,) = generate(small, [prompt], draft=draft, **settings)
    mean = np.mean([row.acceptance_rate for row in rows])
    assert 0.3 < shared < 0.95
    assert abs(mean - shared) < 5 * np.sqrt(0.25 / ROWS)


def test_model_as_its_own_draft_is_always_accepted(lm):
    assert rates(lm, lm, **DRAWN) == [1.0, 1.0, 1.0]


def test_temperature_0_in_some_rows(lm, drafts, texts):
    for draft in (drafts["near"], "prompt"):
        rows = generate(lm, draft=draft, **DRAWN | {"temperature": [0.0, 1.0, 0.0]})
        assert [rows[0], rows[2]] == [texts[0], texts[2]]
        assert rows[1] != texts[1]


def test_seeds_are_independent_of_the_batch(lm, drafts):
    def draw(seed, prompts=PROMPTS):
        return generate(lm, prompts, draft=drafts["near"], **DRAWN | {"seed": seed})

    rows = draw(3)
    assert rows == draw(3)
    assert rows != draw(4)
    assert draw(3, PROMPTS[1:2]) == rows[1:2]


def test_prompt_lookup_without_matches(lm):
    few = DRAWN | {"temperature": 3.0, "max_new_tokens": 6}
    rows = generate(lm, draft="prompt", **few)
    assert rates(lm, "prompt", **few) == [None] * 3
    assert rows == generate(lm, **few)


@pytest.mark.skipif(on_torch(), reason="PyTorch compiles blocks, not programs")
def test_settings_do_not_recompile(monkeypatch):
    traced = []
    for module, name in ((drafting, "next_logits"), (speculative, "verify")):
        original = getattr(module, name)

        def count(*args, original=original, name=name, **kwargs):
            traced.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, count)
    lm = make_lm()
    draft = near(lm)
    generate(lm, draft=draft, **DRAWN)
    assert sorted(traced) == ["next_logits", "verify"]
    generate(lm, draft=draft, **DRAWN | {"temperature": [0.5, 1.0, 2.0], "top_k": 3, "seed": 2})
    generate(lm, draft=draft, **DRAWN, stop_token_ids=[7, 8])
    generate(lm, [[2, 5], [2] * 9, [2]], draft=draft, **DRAWN, max_new_tokens=9)
    assert len(traced) == 2
    generate(lm, draft=draft, **DRAWN, num_draft_tokens=2)  # only the target model recompiles
    assert sorted(traced) == ["next_logits", "verify", "verify"]


class Custom(samplers.Sampler):
    def get_next_token(self, probabilities):
        return keras.ops.argmax(probabilities, axis=-1)


def test_custom_sampler_is_rejected(lm):
    with pytest.raises(ValueError, match=r"'greedy', 'random'.*Leave out `draft`.*: Custom"):
        generate(lm, draft="prompt", sampler=Custom())


@pytest.mark.parametrize("tokens", [0, -1, 33, 2.0, "4", True])
def test_invalid_num_draft_tokens(lm, tokens):
    with pytest.raises(ValueError, match=f"`num_draft_tokens` .*num_draft_tokens={tokens!r}"):
        generate(lm, draft="prompt", num_draft_tokens=tokens)


def test_num_draft_tokens_without_a_draft(lm):
    with pytest.raises(ValueError, match=r"Pass one.*num_draft_tokens=3"):
        generate(lm, num_draft_tokens=3)


@pytest.mark.parametrize("draft", ["text", 3, True, GemmaCausalLM])
def test_invalid_draft(lm, draft):
    with pytest.raises(TypeError, match="`draft` must be a GemmaCausalLM, or 'prompt'"):
        generate(lm, draft=draft)
    with pytest.raises(TypeError, match="`draft` must be a GemmaCausalLM, or 'prompt'"):
        lm.stream(["x"], draft=draft)


def test_draft_with_another_vocabulary(lm, small):
    with pytest.raises(ValueError, match=r"`draft`.*, 512\..*vocabulary size 6"):
        generate(lm, draft=small)


def test_draft_with_a_shorter_context(lm):
    config = types.SimpleNamespace(vocabulary_size=512, context_length=16)
    draft = Draft(4, types.SimpleNamespace(config=config))
    draft.check(lm.backbone.config, 16, samplers.get("greedy"))
    with pytest.raises(ValueError, match=r"`draft` has a context length of 16, .* 17 tokens"):
        draft.check(lm.backbone.config, 17, samplers.get("greedy"))
