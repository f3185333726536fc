"""One matrix in 8 or 4 bits: the scales with the least squared error, and the values they give.

A scale is searched among a few shares of the largest number, which cut the rest off, then fitted
by least squares to the values that it gives, rounded to the dtype that it is stored in, and only
then are the values chosen. Works on slabs that stay in the processor's cache, in threads. Knows
arrays, and neither a layer nor a file.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np

from keras_gemma.backend import Quantized

SHARES = {8: (1.0, 0.8), 4: (1.0, 1.06, 1.12, 0.94, 0.88, 0.8)}
"""Of the largest number, by bits: what becomes the end of the range. In 4 bits the end is -8, so
that a share of 8 / 7 uses -7 to 7."""

SHARES_WITH_ZEROS = (1.0, 0.94, 0.88, 0.82)
"""The same, of the distance between the largest number and the least."""

SLAB = 1 << 17
"""Numbers that are worked on at a time: more, and they leave the processor's cache; fewer, and
threads wait for Python more than they work."""

TASK = 1 << 19
"""Numbers that a thread takes at a time."""

LARGEST = 1e16
"""Of larger numbers the squares of a row may add up to infinity in float32."""

NO_NUMBERS = (
    "The matrix holds NaN, infinity or numbers beyond 1e16, which no scale covers. "
    "Load the weights again, or go back to those from before training failed."
)


def quantize_array(
    array: np.ndarray,
    bits: int,
    group_size: int = 32,
    zeros: bool = False,
    importance: np.ndarray | None = None,
) -> tuple[Quantized, float]:
    """A matrix in the plain form of `backend.Quantized`, and how far it is from the matrix.

    Takes the memory of the result and a few megabytes.

    Args:
        array: float `[out, in]`, in any layout; not changed.
        bits: 8, with a scale a row; or 4, with one for each `group_size` numbers of a row.
        group_size: of 4 bits; it divides `in`.
        zeros: of 4 bits: groups have zero points too.
        importance: `[in]`, what a squared error in each column counts; by default all the same.

    Returns:
        The matrix, and its relative error: the norm of the difference over that of `array`.

    Raises:
        ValueError: other bits, a group size that does not divide, or numbers that are not finite
            or too large to be squared.

    Example:

    ```python
    import numpy as np
    from keras_gemma.quantization import quantize_array

    weight = np.random.default_rng(0).normal(size=(64, 128)).astype("float32")
    quantized, error = quantize_array(weight, bits=4, group_size=32)
    quantized.values.shape, quantized.scales.shape  # (64, 128), (64, 4)
    ```
    """
    result, sums = quantize_rows(array, bits, group_size, zeros, importance)
    return result, relative_error(sums)


def relative_error(sums: np.ndarray) -> float:
    """The square root of the squared errors' sum over the squares' sum, `[2]`."""
    errors, squares = sums
    return float(np.sqrt(errors / squares)) if squares else 0.0


def quantize_rows(
    array: np.ndarray,
    bits: int,
    group_size: int = 32,
    zeros: bool = False,
    importance: np.ndarray | None = None,
) -> tuple[Quantized, np.ndarray]:
    """As `quantize_array`; the sums of the squared errors and of the squares, float64 `[2]`."""
    if bits not in SHARES:
        raise ValueError(f"`bits` must be 8 or 4. Received: bits={bits!r}")
    out, length = array.shape
    if bits == 8:
        group_size, zeros = length, False
    elif group_size < 1 or length % group_size:
        raise ValueError(
            f"`group_size` must divide the length of a row, {length}. "
            f"Received: group_size={group_size}"
        )
    shape, dtype = ((out,), "float32") if bits == 8 else ((out, length // group_size), "bfloat16")
    result = Quantized(
        np.empty((out, length), "int8"),
        np.empty(shape, dtype),
        np.empty(shape, dtype) if zeros else None,
    )
    if importance is not None:
        importance = np.asarray(importance, "float32").reshape(-1, group_size)
    rows = max(1, TASK // length)

    def part(start: int) -> tuple[float, float]:
        here = slice(start, start + rows)
        target = Quantized(*(None if a is None else a[here] for a in result))
        with np.errstate(over="ignore", invalid="ignore"):  # the sums tell
            return _fill(array[here], target, bits, group_size, importance)

    total = np.sum(_in_threads(part, range(0, out, rows)), axis=0)
    if not np.isfinite(total).all():
        raise ValueError(NO_NUMBERS)
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
    """Fill `target`; the sums of the squared errors and of the squares."""
    out, length = array.shape
    groups = length // group_size
    step = max(1, SLAB // length)
    size = (step * groups, group_size)
    # Reduced along the first axis where groups are short: NumPy is slow at many short sums.
    axis = 1 if bits == 8 else 0
    work = [np.empty(size if axis else size[::-1], "float32") for _ in range(4)]
    errors = squares = 0.0
    for start in range(0, out, step):
        here = slice(start, min(out, start + step))
        count = (here.stop - start) * groups
        x, *spare = (w[:count] if axis else w[:, :count] for w in work)
        rows = widen(array[here]).reshape(count, group_size)
        x[...] = rows if axis else rows.T
        weight = None
        if importance is not None:
            weight = np.tile(importance, (count // groups, 1))
            weight = weight if axis else np.ascontiguousarray(weight.T)
        fit = _fit_with_zeros if target.zeros is not None else _fit
        scales, zeros = fit(x, axis, bits, weight, target.scales.dtype, spare)
        q, e = _values(x, scales, zeros, axis, _range(bits, zeros), spare)
        values = target.values[here].reshape(count, group_size)
        values[...] = q if axis else q.T
        target.scales[here] = scales.reshape(target.scales[here].shape)
        if zeros is not None:
            target.zeros[here] = zeros.reshape(target.zeros[here].shape)
        # In float32 within a group, in float64 beyond.
        errors += float(np.dot(_squares(e, axis, None, e).astype("float64"), scales**2.0))
        squares += float(_squares(x, axis, None, e).sum(dtype="float64"))
    return errors, squares


def widen(array: np.ndarray) -> np.ndarray:
    """`array` in float32; bfloat16 by its bits, several times faster than by NumPy's loop."""
    if array.dtype == ml_dtypes.bfloat16:
        return (array.view("uint16").astype("uint32") << 16).view("float32")
    return array.astype("float32", copy=False)


def _range(bits: int, zeros: Any) -> tuple[int, int]:
    """The least and the largest value."""
    if zeros is not None:
        return 0, 15
    return (-127, 127) if bits == 8 else (-8, 7)


def _along(vector: np.ndarray, axis: int) -> np.ndarray:
    return vector[:, None] if axis else vector[None]


def _values(
    x: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray | None,
    axis: int,
    ends: tuple[int, int],
    spare: list[np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest values, and by how much they miss, in units of the scale."""
    y, q = spare[0], spare[1]
    np.multiply(x, _along(np.float32(1) / scales, axis), out=y)
    if zeros is not None:
        y += _along(zeros, axis)
    np.rint(y, out=q)
    np.clip(q, *map(np.float32, ends), out=q)
    np.subtract(y, q, out=y)
    return q, y


def _squares(e: np.ndarray, axis: int, weight: np.ndarray | None, out: np.ndarray) -> np.ndarray:
    """For each group, the sum of `weight * e**2`; `out` is where the terms go."""
    np.multiply(e, e, out=out)
    if weight is not None:
        out *= weight
    return np.add.reduce(out, axis=axis)


def _dot(
    a: np.ndarray, b: np.ndarray, axis: int, weight: np.ndarray | None, out: np.ndarray
) -> np.ndarray:
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
    """Of some scales and zero points, for each group those with the least squared error."""
    best = found = None
    for trial in trials:
        scales, zeros = trial
        _, e = _values(x, scales, zeros, axis, ends, spare)
        error = _squares(e, axis, weight, spare[2]) * scales**2
        if best is None:
            best, found = error, trial
            continue
        better = error < best
        best = np.where(better, error, best)
        pairs = zip(trial, found, strict=True)
        found = tuple(None if a is None else np.where(better, a, b) for a, b in pairs)
    return found


def _fit(
    x: np.ndarray,
    axis: int,
    bits: int,
    weight: np.ndarray | None,
    dtype: Any,
    spare: list[np.ndarray],
) -> tuple[np.ndarray, None]:
    """The scale of each group, where zero stands for zero."""
    ends, terms = _range(bits, None), spare[2]
    largest, least = x.max(axis), x.min(axis)
    # In 4 bits the end of the range is -8: the sign of a scale brings the larger end there.
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


def _fit_with_zeros(
    x: np.ndarray,
    axis: int,
    bits: int,
    weight: np.ndarray | None,
    dtype: Any,
    spare: list[np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """The scale and the zero point of each group, from the line that fits its values best."""
    terms = spare[2]
    ends = _range(bits, 0)
    largest, least = x.max(axis), x.min(axis)
    middle, width = (largest + least) / 2, (largest - least) / np.float32(15)
    flat = width < np.maximum(np.abs(middle) * np.float32(1e-6), np.finfo("float32").tiny)
    width = np.where(flat, np.float32(1), width)
    steps = (width * np.float32(share) for share in SHARES_WITH_ZEROS)
    trials = ((step, np.float32(7.5) - middle / step) for step in steps)
    scales, zeros = _best(trials, x, axis, ends, weight, spare)
    q, _ = _values(x, scales, zeros, axis, ends, spare)
    total = np.float32(x.shape[axis]) if weight is None else np.add.reduce(weight, axis=axis)
    mean_x = (np.add.reduce(x, axis=axis) if weight is None else _sum(x, weight, axis)) / total
    mean_q = (np.add.reduce(q, axis=axis) if weight is None else _sum(q, weight, axis)) / total
    q -= _along(mean_q, axis)
    above, below = _dot(x, q, axis, weight, terms), _dot(q, q, axis, weight, terms)
    fitted = np.where(below > 0, above / np.maximum(below, np.float32(1e-30)), scales)
    fitted = np.where(fitted == 0, scales, fitted)
    # One number alone: a scale of itself, and 1 stands for it.
    fitted = np.where(flat, np.where(middle == 0, np.float32(1), middle), fitted)
    fitted = _store(fitted, dtype)
    zeros = np.where(flat, np.float32(0), mean_q - mean_x / fitted)
    return fitted, _store(zeros, dtype)


def _sum(a: np.ndarray, weight: np.ndarray, axis: int) -> np.ndarray:
    return np.add.reduce(a * weight, axis=axis)


def _store(numbers: np.ndarray, dtype: Any) -> np.ndarray:
    """`numbers` as `dtype` holds them, in float32."""
    return numbers.astype(dtype).astype("float32")


def dequantize_array(plain: Quantized, dtype: Any) -> np.ndarray:
    """The matrix `[out, in]` that the plain form stands for, in `dtype`, rounded from float32."""
    values, scales, zeros = plain
    out, length = values.shape
    result = np.empty((out, length), dtype)
    step = max(1, SLAB // length)
    for start in range(0, out, step):
        here = slice(start, start + step)
        numbers = values[here].astype("float32")
        groups = numbers.reshape(len(numbers), scales[here].size // len(numbers), -1)
        if zeros is not None:
            groups -= widen(zeros[here])[..., None]
        groups *= widen(scales[here]).reshape(groups.shape[:2])[..., None]
        result[here] = numbers
    return result
