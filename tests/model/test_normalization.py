"""RMS normalization, compared with its closed form."""

import ml_dtypes
import numpy as np
import pytest
from keras import ops

from keras_gemma.model.normalization import RMSNormalization, rms_normalize


def closed_form(x, scale, epsilon):
    x, scale = x.astype("float64"), scale.astype("float64")
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon) * (1 + scale)


@pytest.mark.parametrize("epsilon", [1e-6, 0.5])
def test_float32(epsilon):
    random = np.random.default_rng(0)
    x = random.normal(size=(2, 3, 16)).astype("float32")
    scale = random.normal(size=16).astype("float32")
    actual = ops.convert_to_numpy(rms_normalize(x, scale, epsilon))
    np.testing.assert_allclose(actual, closed_form(x, scale, epsilon), rtol=1e-5, atol=1e-6)


def test_bfloat16_is_rounded_once_at_the_end():
    random = np.random.default_rng(0)
    x = random.normal(size=(64, 256)).astype(ml_dtypes.bfloat16)
    # 1 + 2**-9 is 1 in bfloat16, so the sum must be computed in float32.
    scale = np.full(256, 2.0**-9, "float32")
    actual = rms_normalize(ops.convert_to_tensor(x), scale, 1e-6)
    actual = ops.convert_to_numpy(ops.cast(actual, "float32"))
    right = closed_form(x, scale, 1e-6).astype("float32").astype(ml_dtypes.bfloat16)
    # Near a tie, float32 and float64 results may round differently. This is rare.
    assert np.mean(actual == right.astype("float32")) > 0.999


def test_layer():
    layer = RMSNormalization(epsilon=0.25, dtype="bfloat16")
    x = np.ones((1, 4), "float32")
    assert "bfloat16" in str(layer(x).dtype)
    np.testing.assert_array_equal(ops.convert_to_numpy(ops.cast(layer.scale, "float32")), 0)
    actual = ops.convert_to_numpy(ops.cast(layer(x), "float32"))
    np.testing.assert_allclose(actual, 1 / np.sqrt(1.25), rtol=2**-8)
    again = RMSNormalization.from_config(layer.get_config())
    assert again.epsilon == 0.25
