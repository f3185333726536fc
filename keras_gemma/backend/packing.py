"""Layouts of stored weights: aligned host memory, and blocks for XLA on CPU.

Frameworks use aligned host memory without a copy, so weights are read from files directly into
their final place.

XLA on CPU multiplies one row by a matrix `[out, in]` in a single parallel loop only if `in` is at
most a few thousand. For longer rows it first writes the matrix out in float32, which is twenty
times slower. Longer matrices are therefore stored as blocks along `in`, `[blocks, out, in /
blocks]`, whose products are summed.

    [out, in = 9216]  ->  4 x [out, 2304]

Only matrices have blocks, because a lookup needs whole rows of the embedding.
"""

import math
from typing import Any

import ml_dtypes  # noqa: F401  # teaches numpy the name "bfloat16"
import numpy as np

ALIGNMENT = 64
"""Alignment of arrays in bytes. JAX and TensorFlow copy arrays with a smaller alignment."""

TILE = (512, 64)
"""Rows and columns that are transposed at a time."""

MAX_BLOCK_LENGTH = 2304
"""Maximum `in` of a block. XLA 0.10 on a CPU with AVX-512 reads bf16 rows of 2304 at 53 GB/s, of
3072 at 38, of 3584 at 33, and of 4096 at 2."""


def count_blocks(shape: tuple[int, ...], kind: str) -> int:
    """Returns the number of blocks of a stored weight `[out, in]`; 1 means no blocks."""
    length = shape[-1]
    if kind != "matrix" or length <= MAX_BLOCK_LENGTH:
        return 1
    fewest = math.ceil(length / MAX_BLOCK_LENGTH)
    numbers = range(fewest, 2 * fewest + 1)
    return next((blocks for blocks in numbers if length % (64 * blocks) == 0), 1)


def packed_shape(shape: tuple[int, ...], kind: str) -> tuple[int, ...]:
    """Returns the stored shape of a weight: `[out, in]` or `[blocks, out, in / blocks]`."""
    blocks = count_blocks(shape, kind)
    return shape if blocks == 1 else (blocks, shape[0], shape[1] // blocks)


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Returns a new uninitialized array with the alignment of `as_aligned`."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, "uint8")
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def as_aligned(array: np.ndarray, dtype: Any = None) -> np.ndarray:
    """Returns a contiguous, aligned and writable array in `dtype`; copies only if necessary."""
    dtype = array.dtype if dtype is None else np.dtype(dtype)
    aligned = array.ctypes.data % ALIGNMENT == 0
    if aligned and array.dtype == dtype and array.flags.c_contiguous and array.flags.writeable:
        return array
    copy = empty(array.shape, dtype)
    _copy(copy, array)
    return copy


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    """Copies a transposed `source` in tiles, at twice the speed of NumPy's own loop."""
    if source.ndim == 3:
        for target_part, source_part in zip(target, source, strict=True):
            _copy(target_part, source_part)
    elif source.ndim == 2 and source.strides[0] < source.strides[1]:
        rows, columns = TILE
        for i in range(0, source.shape[0], rows):
            for j in range(0, source.shape[1], columns):
                tile = slice(i, i + rows), slice(j, j + columns)
                target[tile] = source[tile].astype(target.dtype, copy=False)
    else:
        np.copyto(target, source, casting="unsafe")


def pack(weight: np.ndarray, kind: str, dtype: Any = None) -> np.ndarray:
    """Packs a weight `[out, in]` in blocks and in `dtype`, with at most one copy."""
    blocks = count_blocks(weight.shape, kind)
    if blocks > 1:
        out, length = weight.shape
        weight = weight.reshape(out, blocks, length // blocks).swapaxes(0, 1)
    return as_aligned(weight, dtype)


def unpack(packed: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Inverse of `pack`, for a weight of this `shape`."""
    return packed if packed.ndim == len(shape) else packed.swapaxes(0, 1).reshape(shape)
