"""Quantization of a matrix, compared with brute force and with scaling by the maximum."""

import ml_dtypes
import numpy as np
import pytest

from keras_gemma.quantization import array as module
from keras_gemma.quantization import dequantize_array, quantize_array

BOTH = pytest.mark.parametrize("zero_points", [False, True])


def normal(*shape, seed=0, tails=False):
    random = np.random.default_rng(seed)
    numbers = random.standard_t(4, shape) if tails else random.normal(size=shape)
    return (0.02 * numbers).astype("float32")


def squared_error(weight, scale, low, high, zero=0.0):
    """Returns the squared error of one group with the nearest values, in float64."""
    values = np.clip(np.rint(weight / scale + zero), low, high)
    return np.sum((weight - scale * (values - zero)) ** 2)


def checked_error(weight, *args, **kwargs):
    """Returns the reported relative error, after a comparison with the actual one."""
    plain, error = quantize_array(weight, *args, **kwargs)
    dequantized = dequantize_array(plain, "float32").astype("float64")
    expected = np.linalg.norm(dequantized - weight) / np.linalg.norm(weight)
    assert error == pytest.approx(expected, rel=1e-3)
    return error


def by_maximum(weight, bits, group_size):
    """Returns the relative error of scaling the largest number to the largest value."""
    groups = weight.reshape(-1, weight.shape[1] if bits == 8 else group_size).astype("float64")
    top = 127 if bits == 8 else 7
    scales = np.abs(groups).max(1, keepdims=True) / top
    return np.linalg.norm(np.rint(groups / scales) * scales - groups) / np.linalg.norm(groups)


@pytest.mark.parametrize("tails", [False, True])
def test_int4_error_is_close_to_brute_force(tails):
    weight = normal(6, 64, tails=tails).astype("float64")
    plain, error = quantize_array(weight.astype("float32"), 4, 32)
    best = 0.0
    for group in weight.reshape(-1, 32):
        largest = np.abs(group).max()
        scales = np.linspace(0.5, 1.3, 400) * largest / 8
        best += min(squared_error(group, s * sign, -8, 7) for s in scales for sign in (1, -1))
    assert error <= 1.05 * np.sqrt(best) / np.linalg.norm(weight)
    assert plain.values.min() >= -8 and plain.values.max() <= 7


def test_int4_error_with_zero_points_is_close_to_brute_force():
    weight = normal(2, 32).astype("float64") + 0.05
    _, error = quantize_array(weight.astype("float32"), 4, 32, zero_points=True)
    best = 0.0
    for group in weight:
        width = np.ptp(group) / 15
        best += min(
            squared_error(group, width * share, 0, 15, 7.5 - middle / (width * share))
            for share in np.linspace(0.6, 1.1, 60)
            for middle in np.linspace(group.min(), group.max(), 60)
        )
    assert error <= 1.1 * np.sqrt(best) / np.linalg.norm(weight)


def test_int8_error_is_close_to_brute_force():
    weight = normal(5, 96, tails=True).astype("float64")
    _, error = quantize_array(weight.astype("float32"), 8)
    best = 0.0
    for row in weight:
        scales = np.linspace(0.4, 1.1, 1500) * np.abs(row).max() / 127
        best += min(squared_error(row, scale, -127, 127) for scale in scales)
    assert error <= 1.05 * np.sqrt(best) / np.linalg.norm(weight)


@pytest.mark.parametrize("tails", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_error_is_below_that_of_maximum_scaling(bits, tails):
    weight = normal(64, 256, tails=tails)
    assert checked_error(weight, bits) < by_maximum(weight, bits, 32) * (0.92 if bits == 4 else 1)


def test_zero_points_reduce_the_error():
    weight = normal(64, 256)
    assert checked_error(weight, 4, zero_points=True) < checked_error(weight, 4)
    assert checked_error(weight + 0.05, 4, zero_points=True) < 0.6 * checked_error(weight + 0.05, 4)


@BOTH
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float64", "transposed", "read-only"])
def test_result_is_independent_of_dtype_and_memory_layout(kind, bits, zero_points):
    if bits == 8 and zero_points:
        pytest.skip("8 bits have no zero points")
    weight = normal(24, 64).astype(ml_dtypes.bfloat16).astype("float32")
    array = weight.copy()
    if kind == "transposed":
        array = np.asfortranarray(weight.astype(ml_dtypes.bfloat16))
    elif kind == "read-only":
        array.flags.writeable = False
    else:
        array = weight.astype(kind)
    before = array.copy()
    expected, _ = quantize_array(weight if kind != "float16" else array, bits, 32, zero_points)
    actual, _ = quantize_array(array, bits, 32, zero_points)
    for one, other in zip(actual, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(array, before)


@BOTH
@pytest.mark.parametrize("bits", [8, 4])
def test_result_is_independent_of_chunks_and_threads(bits, zero_points, monkeypatch):
    weight = normal(50, 96)
    expected = quantize_array(weight, bits, 32, zero_points)
    monkeypatch.setattr(module, "MAX_CHUNK_ELEMENTS", 96 * 7)
    monkeypatch.setattr(module, "MAX_TASK_ELEMENTS", 96 * 11)
    actual = quantize_array(weight, bits, 32, zero_points)
    assert actual[1] == pytest.approx(expected[1])
    for one, other in zip(actual[0], expected[0], strict=True):
        assert (one is None and other is None) or np.array_equal(one, other)


@BOTH
def test_representable_numbers_are_exact(zero_points):
    """Constant rows, zeros and a regular grid have no error."""
    weight = np.zeros((4, 32), "float32")
    weight[1] = 0.375
    weight[2] = -0.375
    weight[3] = 0.5 * np.resize(np.arange(-8, 8), 32)
    plain, error = quantize_array(weight, 4, 32, zero_points)
    np.testing.assert_allclose(dequantize_array(plain, "float32"), weight, atol=1e-6)
    assert error < 1e-6


def test_int8_of_zeros():
    plain, error = quantize_array(np.zeros((3, 8), "float32"), 8)
    assert error == 0 and not plain.values.any() and np.isfinite(plain.scales).all()


@pytest.mark.parametrize("zero_points", [False, True])
def test_importance_reduces_the_error_of_columns(zero_points):
    weight, importance = normal(256, 64), np.ones(64, "float32")
    importance[::8] = 100
    plain, _ = quantize_array(weight, 4, 32, zero_points)
    weighted, _ = quantize_array(weight, 4, 32, zero_points, importance)

    def error(plain):
        off = dequantize_array(plain, "float32") - weight
        return np.sum(importance * off**2), np.sum(off**2)

    assert error(weighted)[0] < 0.95 * error(plain)[0]
    assert error(weighted)[1] > error(plain)[1]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_errors(number, bits):
    weight = normal(8, 64)
    weight[3, 5] = number
    with pytest.raises(ValueError, match="NaN, infinity"):
        quantize_array(weight, bits)


def test_invalid_arguments():
    with pytest.raises(ValueError, match=r"`bits` must be 8 or 4. Received: bits=2"):
        quantize_array(normal(4, 64), 2)
    with pytest.raises(ValueError, match=r"`group_size` must divide .* 64. Received: .*24"):
        quantize_array(normal(4, 64), 4, 24)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_too_large_numbers_are_errors(dtype):
    array = np.random.default_rng(0).normal(size=(3, 64)).astype(dtype)
    for bad in (np.nan, np.inf, -np.inf, *([] if dtype == "float16" else [3e38, -1e17])):
        invalid = array.copy()
        invalid[1, 2] = bad
        for bits in (8, 4):  # warnings are errors
            if abs(bad) != 1e17:
                with pytest.raises(ValueError, match="NaN, infinity"):
                    quantize_array(invalid, bits)
