"""The built-in preset, in our hands and in KerasHub's."""

import keras_hub
import numpy as np
import pytest
from keras import ops

from keras_gemma import GemmaCausalLM
from keras_gemma.storage import resolve

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


def test_kerashub_reads_it_and_says_the_same():
    ours = GemmaCausalLM.from_preset("gemma_tiny_en")
    theirs = keras_hub.models.GemmaCausalLM.from_preset(str(resolve("gemma_tiny_en")))
    x = ours.preprocessor.generate_preprocess(["ROMEO: what light", "To be, or not"], 128)
    logits = ops.convert_to_numpy(ours(x))[x["padding_mask"]]
    expected = ops.convert_to_numpy(theirs(x))[x["padding_mask"]]
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(
    "sampler",
    [keras_hub.samplers.TopKSampler(5, seed=1), keras_hub.samplers.RandomSampler(seed=1)],
)
def test_kerashub_samplers_choose(sampler):
    lm = GemmaCausalLM.from_preset("gemma_tiny_en")
    lm.compile(sampler=sampler)
    first, second = (lm.generate("ROMEO:", max_new_tokens=24) for _ in range(2))
    assert first != second
    lm.compile(sampler=keras_hub.samplers.GreedySampler())
    greedy = lm.generate("ROMEO:", max_new_tokens=24)
    lm.compile(sampler="greedy")
    assert lm.generate("ROMEO:", max_new_tokens=24) == greedy


def test_kerashub_searches_are_refused():
    lm = GemmaCausalLM.from_preset("gemma_tiny_en")
    with pytest.raises(TypeError, match="BeamSampler"):
        lm.compile(sampler=keras_hub.samplers.BeamSampler())
