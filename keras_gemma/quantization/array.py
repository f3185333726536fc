"""Quantization of one matrix to 8 or 4 bits with the least squared error.

For each group, the best of a few clipping ranges gives a first scale. Least squares fits the scale
to the resulting values, and the scale is rounded to its stored dtype. Only then are the values
chosen. Threads work on chunks that stay in the processor's cache. Knows arrays. Knows nothing about
layers and files.
"""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from keras_gemma.backend import Layout, Quantized, quantized

SHARES = {8: (1.0, 0.8), 4: (1.0, 1.06, 1.12, 0.94, 0.88, 0.8)}
"""Candidate clipping ranges by bits, as shares of the largest number. In 4 bits the range ends at
-8, so a share of 8 / 7 uses -7 to 7."""

SHARES_WITH_ZERO_POINTS = (1.0, 0.94, 0.88, 0.82)
"""Candidate ranges with zero points, as shares of the largest minus the smallest number."""

MAX_CHUNK_ELEMENTS = 1 << 17
"""Numbers that are processed at a time. More numbers leave the processor's cache; with fewer, the
threads mostly wait for Python."""

MAX_TASK_ELEMENTS = 1 << 19
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
        group_size = length
    elif group_size < 1 or length % group_size:
        raise ValueError(
            f"`group_size` must divide the length of a row, {length}. "
            f"Received: group_size={group_size}"
        )
    layout = Layout(8, None) if bits == 8 else Layout(4, group_size, zero_points)
    spec = quantized.spec(array.shape, "matrix", layout)
    result = spec._replace(values=((out, length), "int8")).map(lambda entry: np.empty(*entry))
    if importance is not None:
        importance = np.asarray(importance, "float32").reshape(-1, group_size)
    rows = max(1, MAX_TASK_ELEMENTS // length)

    def part(start: int) -> tuple[float, float]:
        part_rows = slice(start, start + rows)
        target = result.map(lambda array: array[part_rows])
        with np.errstate(over="ignore", invalid="ignore"):  # the sums are checked below
            return _fill(array[part_rows], target, bits, group_size, importance)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        total = np.sum(list(pool.map(part, range(0, out, rows))), axis=0)
    if not np.isfinite(total).all():
        raise ValueError(INVALID_NUMBERS)
    return result, total


def _fill(
    array: np.ndarray, target: Quantized, bits: int, group_size: int, importance: np.ndarray | None
) -> tuple[float, float]:
    """Fills `target`; returns the sums of the squared errors and of the squares."""
    out, length = array.shape
    groups = length // group_size
    step = max(1, MAX_CHUNK_ELEMENTS // length)
    size = (step * groups, group_size)
    # Short groups are reduced along the first axis, because NumPy is slow at many short sums.
    axis = 1 if bits == 8 else 0
    work = [np.empty(size if axis else size[::-1], "float32") for _ in range(4)]
    errors = squares = 0.0
    for start in range(0, out, step):
        chunk = slice(start, min(out, start + step))
        count = (chunk.stop - start) * groups
        x, *spare = (w[:count] if axis else w[:, :count] for w in work)
        rows = to_float32(array[chunk]).reshape(count, group_size)
        x[...] = rows if axis else rows.T
        weight = None
        if importance is not None:
            weight = np.tile(importance, (count // groups, 1))
            weight = weight if axis else np.ascontiguousarray(weight.T)
        chunk_groups = _Groups(x, axis, bits, weight, spare)
        fit = chunk_groups.fit if target.zero_points is None else chunk_groups.fit_zero_points
        scales, zero_points = fit(target.scales.dtype)
        q, e = chunk_groups.values(scales, zero_points)
        values = target.values[chunk].reshape(count, group_size)
        values[...] = q if axis else q.T
        target.scales[chunk] = scales.reshape(target.scales[chunk].shape)
        if zero_points is not None:
            target.zero_points[chunk] = zero_points.reshape(target.zero_points[chunk].shape)
        # Sums within a group are float32, sums over groups float64.
        errors += float(np.dot(np.square(e, out=e).sum(axis).astype("float64"), scales**2.0))
        squares += float(np.square(x, out=e).sum(axis).sum(dtype="float64"))
    return errors, squares


def to_float32(array: np.ndarray) -> np.ndarray:
    """Returns `array` in float32. Bit shifts convert bfloat16 several times faster than NumPy."""
    if array.dtype == ml_dtypes.bfloat16:
        return (array.view("uint16").astype("uint32") << 16).view("float32")
    return array.astype("float32", copy=False)


class _Groups(NamedTuple):
    """Groups of a chunk, each along `axis` of `x`."""

    x: np.ndarray
    axis: int
    bits: int
    weight: np.ndarray | None  # of a squared error
    spare: list[np.ndarray]  # three arrays like `x`, overwritten by the methods

    def along(self, vector: np.ndarray) -> np.ndarray:
        return vector[:, None] if self.axis else vector[None]

    def values(self, scales: np.ndarray, zero_points: np.ndarray | None) -> tuple[np.ndarray, ...]:
        """Returns the nearest values and their errors, in units of the scale."""
        y, q, _ = self.spare
        np.multiply(self.x, self.along(np.float32(1) / scales), out=y)
        ends = (-127, 127) if self.bits == 8 else (-8, 7)
        if zero_points is not None:
            y += self.along(zero_points)
            ends = (0, 15)
        np.rint(y, out=q)
        np.clip(q, *map(np.float32, ends), out=q)
        np.subtract(y, q, out=y)
        return q, y

    def dot(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Returns the weighted sum of `a * b` of each group."""
        terms = np.multiply(a, b, out=self.spare[2])
        if self.weight is not None:
            terms *= self.weight
        return np.add.reduce(terms, axis=self.axis)

    def mean(self, a: np.ndarray) -> np.ndarray:
        """Returns the weighted mean of each group."""
        if self.weight is None:
            return np.add.reduce(a, axis=self.axis) / np.float32(a.shape[self.axis])
        total = np.add.reduce(self.weight, axis=self.axis)
        return np.add.reduce(a * self.weight, axis=self.axis) / total

    def best(
        self, trials: Iterable[tuple[np.ndarray, np.ndarray | None]]
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns the scales and zero points of `trials` with the least squared error, by group."""
        least_error = best = None
        for trial in trials:
            scales, zero_points = trial
            _, e = self.values(scales, zero_points)
            error = self.dot(e, e) * scales**2
            if best is None:
                least_error, best = error, trial
                continue
            better = error < least_error
            least_error = np.where(better, error, least_error)
            pairs = zip(trial, best, strict=True)
            best = tuple(None if a is None else np.where(better, a, b) for a, b in pairs)
        return best

    def fit(self, dtype: Any) -> tuple[np.ndarray, None]:
        """Fits the scale of each group, without zero points."""
        largest, least = self.x.max(self.axis), self.x.min(self.axis)
        # In 4 bits the range ends at -8. A negative scale maps a positive largest number to it.
        lowest = np.float32(-127 if self.bits == 8 else -8)
        end = np.where(largest > -least, largest, least) / lowest
        end = np.where(np.abs(end) < np.finfo("float32").tiny, np.float32(1), end)
        scales, _ = self.best((end * np.float32(share), None) for share in SHARES[self.bits])
        q, _ = self.values(scales, None)
        above, below = self.dot(self.x, q), self.dot(q, q)
        fitted = above / np.maximum(below, np.float32(1e-30))
        return _store(np.where(fitted == 0, scales, fitted), dtype), None

    def fit_zero_points(self, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
        """Fits the scale and the zero point of each group by linear regression."""
        largest, least = self.x.max(self.axis), self.x.min(self.axis)
        middle, width = (largest + least) / 2, (largest - least) / np.float32(15)
        flat = width < np.maximum(np.abs(middle) * np.float32(1e-6), np.finfo("float32").tiny)
        width = np.where(flat, np.float32(1), width)
        steps = (width * np.float32(share) for share in SHARES_WITH_ZERO_POINTS)
        scales, zero_points = self.best((step, np.float32(7.5) - middle / step) for step in steps)
        q, _ = self.values(scales, zero_points)
        mean_x, mean_q = self.mean(self.x), self.mean(q)
        q -= self.along(mean_q)
        above, below = self.dot(self.x, q), self.dot(q, q)
        fitted = np.where(below > 0, above / np.maximum(below, np.float32(1e-30)), scales)
        fitted = np.where(fitted == 0, scales, fitted)
        # A constant group: its number is the scale, and its values are 1.
        fitted = np.where(flat, np.where(middle == 0, np.float32(1), middle), fitted)
        fitted = _store(fitted, dtype)
        zero_points = np.where(flat, np.float32(0), mean_q - mean_x / fitted)
        return fitted, _store(zero_points, dtype)


def _store(numbers: np.ndarray, dtype: Any) -> np.ndarray:
    """Rounds `numbers` to `dtype`; returns float32."""
    return numbers.astype(dtype).astype("float32")


def dequantize_array(plain: Quantized, dtype: Any) -> np.ndarray:
    """Returns the matrix `[out, in]` of a plain form in `dtype`, rounded from float32."""
    values, scales, zero_points, minimums = plain
    out, length = values.shape
    result = np.empty((out, length), dtype)
    step = max(1, MAX_CHUNK_ELEMENTS // length)
    for start in range(0, out, step):
        chunk = slice(start, start + step)
        numbers = values[chunk].astype("float32")
        groups = numbers.reshape(len(numbers), scales[chunk].size // len(numbers), -1)
        if zero_points is not None:
            groups -= to_float32(zero_points[chunk])[..., None]
        groups *= to_float32(scales[chunk]).reshape(groups.shape[:2])[..., None]
        if minimums is not None:
            groups += to_float32(minimums[chunk])[..., None]
        result[chunk] = numbers
    return result
