"""Rotary embedding, compared with multiplication of complex numbers."""

import ml_dtypes
import numpy as np
import pytest
from keras import ops

from keras_gemma.model.rope import rotary_angles, rotate


def turn(x, positions):
    """Multiplies pairs (i, i + H/2) of heads `x [B, T, N, H]` by e^(i angle)."""
    half = x.shape[-1] // 2
    numbers = x[..., :half].astype("float64") + 1j * x[..., half:].astype("float64")
    frequencies = 10_000.0 ** (-np.arange(half) / half)
    numbers = numbers * np.exp(1j * positions[:, :, None, None] * frequencies)
    return np.concatenate([numbers.real, numbers.imag], axis=-1)


@pytest.mark.parametrize("head_dim", [2, 8, 256])
def test_rotate(head_dim):
    x = np.random.default_rng(0).normal(size=(2, 5, 3, head_dim)).astype("float32")
    positions = np.array([[0, 1, 2, 3, 4], [7, 100, 1000, 4095, 8191]])
    actual = rotate(x, *rotary_angles(positions, head_dim))
    # A float32 angle of 8191 is exact to 2**-11.
    np.testing.assert_allclose(ops.convert_to_numpy(actual), turn(x, positions), atol=5e-3)
    near = ops.convert_to_numpy(actual)[0]
    np.testing.assert_allclose(near, turn(x, positions)[0], atol=1e-5)


def test_element_is_paired_with_that_half_a_head_later():
    x = np.zeros((1, 1, 1, 8), "float32")
    x[..., 1] = 1.0
    actual = ops.convert_to_numpy(rotate(x, *rotary_angles(np.array([[3]]), 8)))[0, 0, 0]
    assert set(np.flatnonzero(actual)) == {1, 5}


def test_bfloat16_heads_at_adjacent_positions_differ():
    """Positions 8190 and 8191 are equal in bfloat16, but their angles must differ."""
    x = np.random.default_rng(0).normal(size=(1, 2, 1, 16)).astype(ml_dtypes.bfloat16)
    x[:, 1] = x[:, 0]
    positions = np.array([[8190, 8191]])
    cos, sin = rotary_angles(positions, 16)
    assert "float32" in str(cos.dtype) and "float32" in str(sin.dtype)
    actual = rotate(ops.convert_to_tensor(x), cos, sin)
    assert "bfloat16" in str(actual.dtype)
    actual = ops.convert_to_numpy(ops.cast(actual, "float32"))
    np.testing.assert_allclose(actual, turn(x, positions), atol=2**-8 * 3 + 1e-3)
    assert np.abs(actual[0, 0] - actual[0, 1]).max() > 0.1


def test_products_depend_only_on_distance():
    random = np.random.default_rng(0)
    query, key = random.normal(size=(2, 1, 1, 1, 32)).astype("float32")

    def product(position_of_query, position_of_key):
        q = rotate(query, *rotary_angles(np.array([[position_of_query]]), 32))
        k = rotate(key, *rotary_angles(np.array([[position_of_key]]), 32))
        return float(ops.convert_to_numpy(ops.sum(q * k)))

    assert product(7, 3) == pytest.approx(product(104, 100), abs=1e-3)
