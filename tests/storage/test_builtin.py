"""Built-in presets in this package and in KerasHub."""

import keras_hub
import numpy as np
import pytest
from keras import ops

from keras_gemma import GemmaCausalLM
from keras_gemma.storage import resolve

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


@pytest.mark.parametrize("name", ["gemma_tiny_en", "gemma_tiny_instruct_en"])
def test_keras_hub_generates_the_same_text(name):
    ours = GemmaCausalLM.from_preset(name)
    theirs = keras_hub.models.GemmaCausalLM.from_preset(str(resolve(name)))
    x = ours.preprocessor.generate_preprocess(["What light, Reverse", "To be, or not"], 128)
    logits = ops.convert_to_numpy(ours(x))[x["padding_mask"]]
    expected = ops.convert_to_numpy(theirs(x))[x["padding_mask"]]
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()
