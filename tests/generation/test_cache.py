"""Decoding with a KV cache equals the forward pass without one, also beyond the window of 4."""

import numpy as np
import pytest
from keras import ops

from keras_gemma import backend
from keras_gemma.config import GemmaConfig
from keras_gemma.generation import prefill, programs
from keras_gemma.generation.prefill import read_chunk, to_rings
from keras_gemma.model.cache import make_cache
from keras_gemma.model.head import head
from keras_gemma.model.transformer import forward_with_cache
from tests.configurations import CONFIGURATIONS
from tests.models import logits_of, make_lm

NAMES = ["gemma1_multi_query", "gemma2_grouped", "vaultgemma"]

PROMPTS = [[2], [2, 40, 7], [2, 9, 31, 8, 300, 77, 5, 140, 11]]
"""Shorter and longer than the window."""

NEW = 12


@pytest.fixture(scope="module", params=NAMES)
def lm(request):
    return make_lm(request.param, num_layers=3)


@pytest.fixture(scope="module")
def texts(lm):
    """Texts of all prompts, generated in one ragged batch."""
    return lm.generate(PROMPTS, max_new_tokens=NEW, stop_token_ids=None)


def test_every_token_is_the_most_likely_of_the_forward_pass(lm, texts):
    for prompt, text in zip(PROMPTS, texts, strict=True):
        assert text[: len(prompt)] == prompt
        assert len(text) == len(prompt) + NEW
        expected = logits_of(lm, text).argmax(-1)
        assert text[len(prompt) :] == expected[len(prompt) - 1 : -1].tolist()
    assert len(set(texts[2])) > 8  # a constant token would prove little


def test_rows_of_a_ragged_batch_equal_single_prompts(lm, texts):
    for prompt, text in zip(PROMPTS, texts, strict=True):
        assert lm.generate([prompt], max_new_tokens=NEW, stop_token_ids=None) == [text]


def padded(prompts, width):
    token_ids = np.full((len(prompts), width), 499, "int32")  # visible if not masked
    for row, prompt in zip(token_ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    return ops.convert_to_tensor(token_ids)


def test_logits_of_every_step(lm, texts):
    config: GemmaConfig = lm.backbone.config
    weights = lm.backbone.tensors()
    capacity = 32
    lengths = np.array([len(prompt) for prompt in PROMPTS], "int32")

    @backend.compile
    def start(weights, ids, lengths):
        cache = make_cache(config, len(PROMPTS), capacity, "float32")
        hidden = ops.zeros((len(PROMPTS), config.hidden_dim))
        x, cache = read_chunk(weights, ids, 0, lengths, hidden, cache, config)
        cache = to_rings(cache, lengths, config, capacity)
        return head(x, weights["head"], config), cache

    @backend.compile
    def step(weights, token, position, cache):
        x, cache = forward_with_cache(weights, token, position, cache, config)
        return head(x[:, 0], weights["head"], config), cache

    logits, cache = start(weights, padded(PROMPTS, 16), ops.convert_to_tensor(lengths))
    steps = [ops.convert_to_numpy(logits)]
    for i in range(NEW):
        token = [[text[length + i]] for text, length in zip(texts, lengths, strict=True)]
        position = (lengths + i)[:, None]
        token, position = (ops.convert_to_tensor(np.array(x, "int32")) for x in (token, position))
        logits, cache = step(weights, token, position, cache)
        steps.append(ops.convert_to_numpy(logits))
    for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        expected = logits_of(lm, text)[length - 1 :]
        actual = np.stack([step[row] for step in steps])
        tolerance = 1e-4 * np.abs(expected).max()
        np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def test_local_layers_keep_only_the_window():
    config = GemmaConfig(**CONFIGURATIONS["gemma2_grouped"])
    cache = to_rings(
        make_cache(config, 1, 64, "float32"),
        ops.convert_to_tensor(np.array([9], "int32")),
        config,
        64,
    )
    assert [tuple(keys.shape) for keys, _ in cache] == [(1, 4, 2, 8), (1, 64, 2, 8)] * 2


LONG = np.random.default_rng(3).integers(3, 512, 45).tolist()


def test_cache_growth_and_chunks_do_not_change_the_text(lm, monkeypatch):
    """A cache that grows from 8 slots, and a prefill in chunks of 16 tokens."""
    prompts = [LONG, LONG[:3], LONG[5:38]]
    expected = lm.generate(prompts, max_new_tokens=25, stop_token_ids=None)
    monkeypatch.setattr(prefill, "MIN_CACHE_SLOTS", 8)
    monkeypatch.setattr(prefill, "MAX_CHUNK_TOKENS", 16)
    assert lm.generate(prompts, max_new_tokens=25, stop_token_ids=None) == expected
    for prompt, text in zip(prompts, expected, strict=True):
        assert lm.generate([prompt], max_new_tokens=25, stop_token_ids=None) == [text]


def test_chunks_are_buckets_and_bounded():
    assert prefill.chunks(0, 5, 1) == [(0, 16)]
    assert prefill.chunks(0, 600, 1) == [(0, 256), (256, 256), (512, 128)]
    assert prefill.chunks(30, 200, 4) == [(30, 64), (94, 64), (158, 64)]
    assert prefill.chunks(0, 40, 1000) == [(0, 16), (16, 16), (32, 16)]


def test_prefix_does_not_change_the_text(lm):
    prefix = lm.prefill(LONG[:20])
    for prompt in (LONG, LONG[:20], LONG[:21], [*LONG[:9], 7, 8], [5, 6], LONG[:6]):
        expected = lm.generate([prompt], max_new_tokens=9, stop_token_ids=None)
        for _ in range(2):  # the prefix can be reused
            texts = lm.generate([prompt], max_new_tokens=9, stop_token_ids=None, prefix=prefix)
            assert texts == expected
    together = [LONG, [*LONG[:9], 7, 8]]
    expected = lm.generate(together, max_new_tokens=9, stop_token_ids=None)
    assert expected == lm.generate(together, max_new_tokens=9, stop_token_ids=None, prefix=prefix)


def test_shared_tokens_are_not_prefilled_again(lm, monkeypatch):
    prefix = lm.prefill(LONG[:20])
    spans = []
    chunks = programs.chunks
    monkeypatch.setattr(
        programs,
        "chunks",
        lambda start, end, batch: spans.append((start, end)) or chunks(start, end, batch),
    )
    for prompt in (LONG, LONG[:20], [*LONG[:9], 7]):
        lm.generate([prompt], max_new_tokens=2, stop_token_ids=None, prefix=prefix)
    assert spans == [(20, 45), (19, 20), (9, 10)]
