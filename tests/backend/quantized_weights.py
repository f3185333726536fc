"""Random quantized weights in every layout, and their definition in NumPy."""

import ml_dtypes  # noqa: F401  # teaches numpy the name "bfloat16"
import numpy as np

from keras_gemma.backend import Layout, Quantized

FORMS = {
    "int8": Layout(8, None),
    "int8_groups": Layout(8, 32, scale_dtype="float16"),
    "int8_minimums": Layout(8, 32, minimums=True, scale_dtype="float32"),
    "int4": Layout(4, 32),
    "int4_zeros": Layout(4, 32, zero_points=True),
    "int4_minimums": Layout(4, 32, minimums=True, scale_dtype="float16"),
}
"""Layouts in groups of 32, by name."""


def with_size(form: str, group_size: int) -> Layout:
    """Returns a layout of `FORMS` in groups of another size."""
    layout = FORMS[form]
    return layout if layout.group_size is None else layout._replace(group_size=group_size)


def random_plain(shape: tuple[int, int], layout: Layout, seed: int = 0) -> Quantized:
    """Returns a random weight in the plain form with different scales."""
    rng = np.random.default_rng(seed)
    if layout.group_size is None:
        values = rng.integers(-127, 128, shape, dtype="int8")
        return Quantized(values, rng.uniform(0.01, 0.02, shape[:1]).astype("float32"))
    groups, dtype = (shape[0], shape[1] // layout.group_size), np.dtype(layout.scale_dtype)
    unsigned = layout.zero_points or layout.minimums
    low, high = (-128, 128) if layout.bits == 8 else (0, 16) if unsigned else (-8, 8)
    return Quantized(
        rng.integers(low, high, shape, dtype="int8"),
        rng.uniform(0.1, 0.2, groups).astype(dtype),
        rng.integers(0, 16, groups).astype(dtype) if layout.zero_points else None,
        rng.uniform(-2, 0, groups).astype(dtype) if layout.minimums else None,
    )


def dequantized(plain: Quantized) -> np.ndarray:
    """Returns `[out, in]` in float64, from the definition."""
    values, *of_groups = (None if part is None else part.astype("float64") for part in plain)
    scales, zero_points, minimums = (
        None if part is None else np.repeat(part, values.shape[1] // part[0].size, axis=-1)
        for part in (part if part is None else part.reshape(len(values), -1) for part in of_groups)
    )
    zero_points = 0 if zero_points is None else zero_points
    return scales * (values - zero_points) + (0 if minimums is None else minimums)
