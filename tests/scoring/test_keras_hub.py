"""Comparison with KerasHub's `score`, and the example of its documentation."""

import re
import textwrap

import keras
import numpy as np
import pytest

import keras_gemma
from keras_gemma import to_keras_hub
from tests.models import make_lm
from tests.scoring.texts import IDS, MASK, TARGETS, close, numpy
from tests.storage.keras_hub_weights import leaves_a_file_open

REAL = MASK.astype("bool")


@pytest.fixture(scope="module", params=["gemma1_multi_query", "gemma2_grouped"])
def pair(request):
    lm = make_lm(request.param)
    return lm, to_keras_hub(lm)


def test_logits_and_losses(pair):
    logits = [numpy(lm.score(IDS, MASK))[REAL] for lm in pair]
    close(*logits)
    losses = [numpy(lm.score(IDS, MASK, "loss", None, TARGETS))[REAL] for lm in pair]
    close(*losses)


def test_layer_intercept_fn(pair):
    """Inputs and replaced block outputs are equal; KerasHub ignores the result at layer -1."""
    seen = [], []

    def intercept(calls):
        def hook(x, layer):
            calls.append((layer, numpy(keras.ops.stop_gradient(x))[REAL]))
            return x if layer < 0 else x * (1.5 - layer)

        return hook

    hooked = [
        numpy(keras.ops.stop_gradient(lm.score(IDS, MASK, layer_intercept_fn=intercept(calls))))
        for lm, calls in zip(pair, seen, strict=True)
    ]
    close(*(logits[REAL] for logits in hooked))
    for (layer, ours), (other, theirs) in zip(*seen, strict=True):
        assert layer == other
        close(ours, theirs)


@leaves_a_file_open
@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="The example uses TensorFlow.")
def test_documented_example(tmp_path, monkeypatch):
    """Runs the example in a function, because it uses `nonlocal`."""
    import keras_hub
    import tensorflow as tf

    (example,) = re.findall(
        r"```python\n(.*?)```", keras_hub.models.GemmaCausalLM.score.__doc__, re.DOTALL
    )
    preset = str(tmp_path / "preset")
    keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en", dtype="float32").save_to_preset(
        preset
    )
    body = textwrap.dedent(example).replace('"gemma_2b_en"', f'{preset!r}, dtype="float32"')
    code = f"def run():\n{textwrap.indent(body, '    ')}\n    return locals()"
    results = []
    for library in (keras_gemma, keras_hub):
        names = {"keras_hub": library, "keras": keras, "tf": tf}
        exec(code, names)
        results.append(names["run"]())
    ours, theirs = results
    assert ours["generations"] == theirs["generations"]
    mask = numpy(theirs["padding_mask"])
    counted = mask & np.roll(mask, -1, axis=1)
    np.testing.assert_array_equal(numpy(ours["padding_mask"]), mask)
    close(numpy(ours["losses"])[counted], numpy(theirs["losses"])[counted])
    close(numpy(ours["grads"])[mask], numpy(theirs["grads"])[mask])
