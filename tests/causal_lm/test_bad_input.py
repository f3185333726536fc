"""Invalid arguments raise errors that name them, before any computation."""

import keras
import numpy as np
import pytest

from keras_gemma import GemmaBackbone, GemmaCausalLM, GemmaPreprocessor
from keras_gemma.samplers import GreedySampler, TopKSampler
from tests.configurations import GEMMA1
from tests.models import make_lm


@pytest.fixture(scope="module")
def lm(tiny_proto):
    return make_lm(proto=tiny_proto, sequence_length=16)


@pytest.mark.parametrize(
    "ids",
    [
        [[2, 2**32 + 200]],
        [[2.5, 3.7]],
        [["2", "3"], ["4", "5"]],
        [[True, False]],
        [[2, 2**40]],
        np.array([[2, -1]]),
    ],
)
def test_ids_are_never_rounded_or_wrapped(lm, ids):
    with pytest.raises((ValueError, TypeError)):
        lm.generate(ids, max_new_tokens=2)
    with pytest.raises(ValueError, match="token_ids"):
        lm.score(ids)
    with pytest.raises(ValueError, match="token_ids"):
        lm.generate({"token_ids": ids, "padding_mask": np.ones((1, 2))})


@pytest.mark.parametrize("inputs", [None, 5, {1, 2}, object()])
def test_inputs_of_an_unknown_type(lm, inputs):
    with pytest.raises(TypeError, match="`inputs` must be"):
        lm.generate(inputs, max_new_tokens=2)


@pytest.mark.parametrize("stops", [1.5, [-1], 10**6, ["<eos>"], [[1]]])
def test_stop_ids(lm, stops):
    with pytest.raises(ValueError, match="stop_token_ids"):
        lm.generate("To be", max_new_tokens=2, stop_token_ids=stops)


@pytest.mark.parametrize("seed", [1.5, "x", True])
def test_seed(lm, seed):
    with pytest.raises(ValueError, match="`seed`"):
        lm.generate("To be", max_new_tokens=2, seed=seed)


def test_limits_hold_for_padded_ids(lm):
    ids = np.array([[2, 200, 201, 0, 0, 0, 0, 0]])
    inputs = {"token_ids": ids, "padding_mask": ids > 0}
    for limits, length in (({"max_new_tokens": 2}, 5), ({"max_length": 6}, 6), ({}, 8)):
        outputs = lm.generate(inputs, stop_token_ids=None, **limits)
        assert outputs["padding_mask"].sum() == length
    with pytest.raises(ValueError, match="no room"):
        lm.generate(inputs, stop_token_ids=None, max_length=3)


def test_masks_and_hooks_of_score(lm):
    ids = np.array([[2, 200, 201]])
    with pytest.raises(ValueError, match="padding_mask"):
        lm.score(ids, padding_mask=np.ones((1, 1)))
    with pytest.raises(ValueError, match="layer_intercept_fn"):
        lm.score(ids, layer_intercept_fn=3)


def test_misspelled_arguments():
    with pytest.raises(ValueError, match="sliding_window"):
        GemmaBackbone(**GEMMA1, sliding_window=4)
    with pytest.raises(ValueError, match="preprocesor"):
        GemmaCausalLM(GemmaBackbone(**GEMMA1), preprocesor=None)


def test_components_of_the_wrong_type(lm):
    with pytest.raises(TypeError, match="`backbone`"):
        GemmaCausalLM(None)
    with pytest.raises(TypeError, match="`preprocessor`"):
        GemmaCausalLM(lm.backbone, GemmaPreprocessor(lm.preprocessor.tokenizer))


class Last(GreedySampler):
    def choose(self, logits, state):
        return keras.ops.argmin(logits, axis=-1)


class LastByProbability(TopKSampler):
    def get_next_token(self, probabilities):
        return keras.ops.argmin(probabilities, axis=-1)


@pytest.mark.parametrize("sampler", [Last(), LastByProbability()])
def test_subclass_of_a_sampler_overrides_it(lm, sampler):
    lm.compile(sampler="greedy")
    greedy = lm.generate("To be", max_new_tokens=4)
    lm.compile(sampler=sampler)
    assert lm.generate("To be", max_new_tokens=4) != greedy
