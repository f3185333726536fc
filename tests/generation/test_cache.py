"""Decoding with a cache equals the forward pass without one, also past the window (of 4)."""

import numpy as np
import pytest
from keras import ops

from keras_gemma import backend
from keras_gemma.config import GemmaConfig
from keras_gemma.generation.decode import DecodeState, feed
from keras_gemma.generation.prefill import prefill
from keras_gemma.model.backbone import GemmaBackbone
from keras_gemma.model.head import head
from tests.configurations import CONFIGURATIONS
from tests.generation.models import logits_of, make_lm

NAMES = ["gemma1_multi_query", "gemma2_grouped", "vaultgemma"]

PROMPTS = [[2], [2, 40, 7], [2, 9, 31, 8, 300, 77, 5, 140, 11]]
"""Shorter and longer than the window."""

NEW = 12


@pytest.fixture(scope="module", params=NAMES)
def lm(request):
    return make_lm(request.param)


@pytest.fixture(scope="module")
def texts(lm):
    """Of all prompts in one ragged batch."""
    return lm.generate(PROMPTS, max_new_tokens=NEW, stop_token_ids=None)


def test_every_token_is_the_likeliest_of_the_forward_pass(lm, texts):
    for prompt, text in zip(PROMPTS, texts, strict=True):
        assert text[: len(prompt)] == prompt
        assert len(text) == len(prompt) + NEW
        expected = logits_of(lm, text).argmax(-1)
        assert text[len(prompt) :] == expected[len(prompt) - 1 : -1].tolist()
    assert len(set(texts[2])) > 8  # a constant token would prove little


def test_ragged_rows_equal_each_prompt_alone(lm, texts):
    for prompt, text in zip(PROMPTS, texts, strict=True):
        assert lm.generate([prompt], max_new_tokens=NEW, stop_token_ids=None) == [text]


def test_logits_of_every_step(lm, texts):
    config: GemmaConfig = lm.backbone.config
    weights = lm.backbone.tensors()
    width, capacity = 16, 32
    lengths = np.array([len(prompt) for prompt in PROMPTS], "int32")
    padded = np.full((len(PROMPTS), width), 499, "int32")  # padding that would be seen
    for row, prompt in zip(padded, PROMPTS, strict=True):
        row[: len(prompt)] = prompt

    @backend.compile
    def start(weights, ids, lengths):
        x, cache = prefill(weights, ids, lengths, config=config, capacity=capacity)
        return head(x, weights["head"], config), cache

    step = backend.compile(
        lambda weights, token, length, cache: feed(weights, state_of(token, length, cache), config)
    )
    logits, cache = start(weights, ops.convert_to_tensor(padded), ops.convert_to_tensor(lengths))
    steps = [ops.convert_to_numpy(logits)]
    for i in range(NEW):
        token = [text[length + i] for text, length in zip(texts, lengths, strict=True)]
        logits, cache = step(
            weights,
            ops.convert_to_tensor(np.array(token, "int32")),
            ops.convert_to_tensor(lengths + i + 1),
            cache,
        )
        steps.append(ops.convert_to_numpy(logits))
    for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        expected = logits_of(lm, text)[length - 1 :]
        actual = np.stack([step[row] for step in steps])
        tolerance = 1e-4 * np.abs(expected).max()
        np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def state_of(token, length, cache):
    rest = dict.fromkeys(("output", "count", "room", "stop_ids", "done", "sampler"))
    return DecodeState(token=token, length=length, cache=cache, **rest)


def test_local_layers_keep_the_window_alone():
    backbone = GemmaBackbone(**CONFIGURATIONS["gemma2_grouped"])
    ids = ops.convert_to_tensor(np.full((1, 16), 7, "int32"))
    lengths = ops.convert_to_tensor(np.array([9], "int32"))
    _, cache = backend.compile(
        lambda weights: prefill(weights, ids, lengths, config=backbone.config, capacity=64)
    )(backbone.tensors())
    assert [tuple(keys.shape) for keys, _ in cache] == [(1, 4, 2, 8), (1, 64, 2, 8)] * 2
