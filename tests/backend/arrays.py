"""Random arrays, and conversion between tensors and float32 NumPy arrays."""

from typing import Any

import ml_dtypes
import numpy as np
from keras import ops


def normal(*shape: int, dtype: str = "float32", seed: int = 0) -> np.ndarray:
    """Returns normal numbers in float32 that `dtype` represents exactly."""
    array = np.random.default_rng(seed).normal(size=shape).astype("float32")
    return array.astype(ml_dtypes.bfloat16).astype("float32") if dtype == "bfloat16" else array


def to_numpy(x: Any) -> np.ndarray:
    return ops.convert_to_numpy(ops.cast(x, "float32"))


def tensor(array: np.ndarray, dtype: str = "float32") -> Any:
    return ops.convert_to_tensor(array, dtype=dtype)


def assert_close(actual: Any, expected: np.ndarray, dtype: str) -> None:
    """Checks equality up to the rounding of float32 sums, or of bfloat16 sums over blocks."""
    actual = to_numpy(actual)
    assert actual.shape == expected.shape
    tolerance = {"float32": 1e-5, "bfloat16": 2**-7}[dtype] * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)
