"""Masks, and attention with masks."""

import numpy as np
import pytest
from keras import ops

from keras_gemma.config import GemmaConfig
from keras_gemma.model.attention import attention, causal_mask
from keras_gemma.model.backbone import GemmaBackbone
from keras_gemma.model.rope import rotary_angles
from tests.configurations import CONFIGURATIONS, GEMMA2


@pytest.mark.parametrize("window", [None, 1, 3, 5, 100])
def test_causal_mask(window):
    attended = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1]], bool)
    expected = np.zeros((3, 5, 5), bool)
    for row in range(3):
        for query in range(5):
            for key in range(query + 1):
                in_window = window is None or query - key < window
                expected[row, query, key] = in_window and attended[row, key]
    actual = ops.convert_to_numpy(causal_mask(ops.convert_to_tensor(attended), window))
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("dtype", ["int32", "float32"])
def test_mask_of_numbers(dtype):
    attended = np.array([[1, 1, 0]], dtype)
    actual = ops.convert_to_numpy(causal_mask(ops.convert_to_tensor(attended), None))
    assert actual.dtype == bool and actual.sum() == 5


def test_fully_masked_rows_give_zeros():
    config = GemmaConfig(**GEMMA2)
    random = np.random.default_rng(0)
    shapes = {"query": (32, 32), "key": (16, 32), "value": (16, 32), "output": (32, 32)}
    weights = {
        name: ops.convert_to_tensor(random.normal(size=shape).astype("float32"))
        for name, shape in shapes.items()
    }
    x = ops.convert_to_tensor(random.normal(size=(2, 3, 32)).astype("float32"))
    rotary = rotary_angles(ops.arange(3, dtype="int32")[None], 8)
    mask = causal_mask(ops.convert_to_tensor(np.array([[1, 1, 1], [0, 0, 0]], bool)), None)
    actual, (key, value) = attention(x, weights, config, rotary, mask)
    actual = ops.convert_to_numpy(actual)
    assert np.isfinite(actual).all() and np.abs(actual[0]).min() > 0
    np.testing.assert_array_equal(actual[1], 0)
    assert tuple(key.shape) == tuple(value.shape) == (2, 3, 2, 8)


@pytest.mark.parametrize("variant", ["gemma1_multi_query", "gemma2_grouped"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_padding_rows_have_no_nan(variant, dtype):
    backbone = GemmaBackbone(**CONFIGURATIONS[variant], dtype=dtype)
    ids = np.array([[2, 7, 9, 30, 4, 8], [0, 0, 0, 0, 0, 0]])
    hidden = backbone({"token_ids": ids, "padding_mask": (ids > 0).astype("int32")})
    assert np.isfinite(ops.convert_to_numpy(ops.cast(hidden, "float32"))).all()


def test_padding_does_not_change_earlier_positions():
    backbone = GemmaBackbone(**GEMMA2)
    ids = np.array([[2, 7, 9, 30, 4, 8]])
    short = backbone({"token_ids": ids[:, :4], "padding_mask": np.ones((1, 4), "int32")})
    mask = np.array([[1, 1, 1, 1, 0, 0]])
    padded = backbone({"token_ids": ids, "padding_mask": mask})
    np.testing.assert_allclose(
        ops.convert_to_numpy(short), ops.convert_to_numpy(padded)[:, :4], atol=1e-5
    )
