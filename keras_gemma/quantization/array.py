"""Quantization of one matrix to 8 or 4 bits with the least squared error.

For each group, the best of a few clipping ranges gives a first scale. Least squares fits the scale
to the resulting values, and the scale is rounded to its stored dtype. Only then are the values
chosen. Threads work on slabs that stay in the processor's cache. Knows arrays. Knows nothing about
layers and files.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np

from keras_gemma.backend import Quantized

SHARES = {8: (1.0, 0.8), 4: (1.0, 1.06, 1.12, 0.94, 0.88, 0.8)}
"""Candidate clipping ranges by bits, as shares of the largest number. In 4 bits the range ends at
-8, so a share of 8 / 7 uses -7 to 7."""

SHARES_WITH_ZERO_POINTS = (1.0, 0.94, 0.88, 0.82)
"""Candidate ranges with zero points, as shares of the largest minus the smallest number."""

CHUNK = 1 << 17
"""Numbers that are processed at a time. More numbers leave the processor's cache; with fewer, the
threads mostly wait for Python."""

TASK = 1 << 19
"""Numbers that a thread takes at a time."""

MAX_ABS = 1e16
"""Maximum absolute value that can be quantized. Sums of larger squares may overflow float32."""

INVALID_NUMBERS = (
    "The matrix contains NaN, infinity or numbers beyond 1e16, which cannot be quantized. "
    "Load the weights again, or use a checkpoint from before training diverged."
)


def quantize_array(
    array: np.ndarray,
    bits: int,
    group_size: int = 32,
    zero_points: bool = False,
    importance: np.ndarray | None = None,
) -> tuple[Quantized, float]:
    """Quantizes a matrix to the plain form of `backend.Quantized`.

    Needs the memory of the result and a few megabytes.

    Args:
        array: Float `[out, in]` in any memory layout. Not modified.
        bits: 8 for one scale per row, or 4 for one scale per group.
        group_size: Numbers of a row that share a scale in 4 bits. Must divide `in`. Defaults to 32.
        zero_points: If True, groups have zero points in 4 bits. Defaults to False.
        importance: `[in]`, the weight of a squared error in each column. `None` weights all columns
            equally.

    Returns:
        The quantized matrix, and its relative error: the norm of the difference over the norm of
        `array`.

    Raises:
        ValueError: If `bits` is not 8 or 4, `group_size` does not divide `in`, or `array` contains
            NaN, infinity or numbers beyond 1e16.

    Example:

    ```python
    import numpy as np
    from keras_gemma.quantization import quantize_array

    weight = np.random.default_rng(0).normal(size=(64, 128)).astype("float32")
    quantized, error = quantize_array(weight, bits=4, group_size=32)
    quantized.values.shape, quantized.scales.shape  # (64, 128), (64, 4)
    ```
    """
    result, sums = quantize_rows(array, bits, group_size, zero_points, importance)
    return result, relative_error(sums)


def relative_error(sums: np.ndarray) -> float:
    """Returns the relative error from `sums [2]`: of the squared errors and of the squares."""
    errors, squares = sums
    return float(np.sqrt(errors / squares)) if squares else 0.0


def quantize_rows(
    array: np.ndarray,
    bits: int,
    group_size: int = 32,
    zero_points: bool = False,
    importance: np.ndarray | None = None,
) -> tuple[Quantized, np.ndarray]:
    """Same as `quantize_array`, but returns float64 `[2]`: sums of squared errors and squares."""
    if bits not in SHARES:
        raise ValueError(f"`bits` must be 8 or 4. Received: bits={bits!r}")
    out, length = array.shape
    if bits == 8:
        group_size, zero_points = length, False
    elif group_size < 1 or length % group_size:
        raise ValueError(
            f"`group_size` must divide the length of a row, {length}. "
            f"Received: group_size={group_size}"
        )
    shape, dtype = ((out,), "float32") if bits == 8 else ((out, length // group_size), "bfloat16")
    result = Quantized(
        np.empty((out, length), "int8"),
        np.empty(shape, dtype),
        np.empty(shape, dtype) if zero_points else None,
    )
    if importance is not None:
        importance = np.asarray(importance, "float32").reshape(-1, group_size)
    rows = max(1, TASK // length)

    def part(start: int) -> tuple[float, float]:
        part_rows = slice(start, start + rows)
        target = Quantized(*(None if a is None else a[part_rows] for a in result))
        with np.errstate(over="ignore", invalid="ignore"):  # the sums are checked below
            return _fill(array[part_rows], target, bits, group_size, importance)

    total = np.sum(_in_threads(part, range(0, out, rows)), axis=0)
    if not np.isfinite(total).all():
        raise ValueError(INVALID_NUMBERS)
    return result, total


def _in_threads(part: Callable[[int], Any], starts: range) -> list[Any]:
    if len(starts) == 1:
        return [part(0)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(part, starts))


def _fill(
    array: np.ndarray,
    target: Quantized,
    bits: int,
    group_size: int,
    importance: np.ndarray | None,
) -> tuple[float, float]:
    """Fills `target`; returns the sums of the squared errors and of the squares."""
    out, length = array.shape
    groups = length // group_size
    step = max(1, CHUNK // length)
    size = (step * groups, group_size)
    # Short groups are reduced along the first axis, because NumPy is slow at many short sums.
    axis = 1 if bits == 8 else 0
    work = [np.empty(size if axis else size[::-1], "float32") for _ in range(4)]
    errors = squares = 0.0
    for start in range(0, out, step):
        slab = slice(start, min(out, start + step))
        count = (slab.stop - start) * groups
        x, *spare = (w[:count] if axis else w[:, :count] for w in work)
        rows = to_float32(array[slab]).reshape(count, group_size)
        x[...] = rows if axis else rows.T
        weight = None
        if importance is not None:
            weight = np.tile(importance, (count // groups, 1))
            weight = weight if axis else np.ascontiguousarray(weight.T)
        fit = _fit_with_zero_points if target.zero_points is not None else _fit
        scales, zero_points = fit(x, axis, bits, weight, target.scales.dtype, spare)
        q, e = _values(x, scales, zero_points, axis, _range(bits, zero_points), spare)
        values = target.values[slab].reshape(count, group_size)
        values[...] = q if axis else q.T
        target.scales[slab] = scales.reshape(target.scales[slab].shape)
        if zero_points is not None:
            target.zero_points[slab] = zero_points.reshape(target.zero_points[slab].shape)
        # Sums within a group are float32, sums over groups float64.
        errors += float(np.dot(_dot(e, e, axis, None, e).astype("float64"), scales**2.0))
        squares += float(_dot(x, x, axis, None, e).sum(dtype="float64"))
    return errors, squares


def to_float32(array: np.ndarray) -> np.ndarray:
    """Returns `array` in float32. Bit shifts convert bfloat16 several times faster than NumPy."""
    if array.dtype == ml_dtypes.bfloat16:
        return (array.view("uint16").astype("uint32") << 16).view("float32")
    return array.astype("float32", copy=False)


def _range(bits: int, zero_points: Any) -> tuple[int, int]:
    """Returns the smallest and the largest value."""
    if zero_points is not None:
        return 0, 15
    return (-127, 127) if bits == 8 else (-8, 7)


def _along(vector: np.ndarray, axis: int) -> np.ndarray:
    return vector[:, None] if axis else vector[None]


def _values(
    x: np.ndarray,
    scales: np.ndarray,
    zero_points: np.ndarray | None,
    axis: int,
    ends: tuple[int, int],
    spare: list[np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the nearest values and their errors, in units of the scale."""
    y, q = spare[0], spare[1]
    np.multiply(x, _along(np.float32(1) / scales, axis), out=y)
    if zero_points is not None:
        y += _along(zero_points, axis)
    np.rint(y, out=q)
    np.clip(q, *map(np.float32, ends), out=q)
    np.subtract(y, q, out=y)
    return q, y


def _dot(
    a: np.ndarray, b: np.ndarray, axis: int, weight: np.ndarray | None, out: np.ndarray
) -> np.ndarray:
    """Returns the sum of `weight * a * b` of each group; the terms are written to `out`."""
    np.multiply(a, b, out=out)
    if weight is not None:
        out *= weight
    return np.add.reduce(out, axis=axis)


def _best(
    trials: Iterable[tuple[np.ndarray, np.ndarray | None]],
    x: np.ndarray,
    axis: int,
    ends: tuple[int, int],
    weight: np.ndarray | None,
    spare: list[np.ndarray],
) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns the scales and zero points of `trials` with the least squared error, by group."""
    least_error = best = None
    for trial in trials:
        scales, zero_points = trial
        _, e = _values(x, scales, zero_points, axis, ends, spare)
        error = _dot(e, e, axis, weight, spare[2]) * scales**2
        if best is None:
            least_error, best = error, trial
            continue
        better = error < least_error
        least_error = np.where(better, error, least_error)
        pairs = zip(trial, best, strict=True)
        best = tuple(None if a is None else np.where(better, a, b) for a, b in pairs)
    return best


def _fit(
    x: np.ndarray,
    axis: int,
    bits: int,
    weight: np.ndarray | None,
    dtype: Any,
    spare: list[np.ndarray],
) -> tuple[np.ndarray, None]:
    """Fits the scale of each group, without zero points."""
    ends, terms = _range(bits, None), spare[2]
    largest, least = x.max(axis), x.min(axis)
    # In 4 bits the range ends at -8. A negative scale maps a positive largest number to that end.
    end = np.where(largest > -least, largest, least) / np.float32(ends[0])
    end = np.where(np.abs(end) < np.finfo("float32").tiny, np.float32(1), end)
    trials = ((end * np.float32(share), None) for share in SHARES[bits])
    scales, _ = _best(trials, x, axis, ends, weight, spare)
    q, _ = _values(x, scales, None, axis, ends, spare)
    above = _dot(x, q, axis, weight, terms)
    below = _dot(q, q, axis, weight, terms)
    fitted = above / np.maximum(below, np.float32(1e-30))
    fitted = np.where(fitted == 0, scales, fitted)
    return _store(fitted, dtype), None


def _fit_with_zero_points(
    x: np.ndarray,
    axis: int,
    bits: int,
    weight: np.ndarray | None,
    dtype: Any,
    spare: list[np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """Fits the scale and the zero point of each group by linear regression."""
    terms = spare[2]
    ends = _range(bits, 0)
    largest, least = x.max(axis), x.min(axis)
    middle, width = (largest + least) / 2, (largest - least) / np.float32(15)
    flat = width < np.maximum(np.abs(middle) * np.float32(1e-6), np.finfo("float32").tiny)
    width = np.where(flat, np.float32(1), width)
    steps = (width * np.float32(share) for share in SHARES_WITH_ZERO_POINTS)
    trials = ((step, np.float32(7.5) - middle / step) for step in steps)
    scales, zero_points = _best(trials, x, axis, ends, weight, spare)
    q, _ = _values(x, scales, zero_points, axis, ends, spare)
    total = np.float32(x.shape[axis]) if weight is None else np.add.reduce(weight, axis=axis)
    mean_x = (np.add.reduce(x, axis=axis) if weight is None else _sum(x, weight, axis)) / total
    mean_q = (np.add.reduce(q, axis=axis) if weight is None else _sum(q, weight, axis)) / total
    q -= _along(mean_q, axis)
    above, below = _dot(x, q, axis, weight, terms), _dot(q, q, axis, weight, terms)
    fitted = np.where(below > 0, above / np.maximum(below, np.float32(1e-30)), scales)
    fitted = np.where(fitted == 0, scales, fitted)
    # A constant group: its number is the scale, and its values are 1.
    fitted = np.where(flat, np.where(middle == 0, np.float32(1), middle), fitted)
    fitted = _store(fitted, dtype)
    zero_points = np.where(flat, np.float32(0), mean_q - mean_x / fitted)
    return fitted, _store(zero_points, dtype)


def _sum(a: np.ndarray, weight: np.ndarray, axis: int) -> np.ndarray:
    return np.add.reduce(a * weight, axis=axis)


def _store(numbers: np.ndarray, dtype: Any) -> np.ndarray:
    """Rounds `numbers` to `dtype`; returns float32."""
    return numbers.astype(dtype).astype("float32")


def dequantize_array(plain: Quantized, dtype: Any) -> np.ndarray:
    """Returns the matrix `[out, in]` of a plain form in `dtype`, rounded from float32."""
    values, scales, zero_points = plain
    out, length = values.shape
    result = np.empty((out, length), dtype)
    step = max(1, CHUNK // length)
    for start in range(0, out, step):
        slab = slice(start, start + step)
        numbers = values[slab].astype("float32")
        groups = numbers.reshape(len(numbers), scales[slab].size // len(numbers), -1)
        if zero_points is not None:
            groups -= to_float32(zero_points[slab])[..., None]
        groups *= to_float32(scales[slab]).reshape(groups.shape[:2])[..., None]
        result[slab] = numbers
    return result
