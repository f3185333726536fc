"""Layouts of a stored matrix that XLA on CPU reads at the speed of memory.

XLA multiplies one row with a matrix `[out, in]` in a single parallel loop only while `in` is a few
thousand; past that it first writes the matrix out in float32, twenty times slower. A longer
matrix is therefore stored as blocks along `in`, `[blocks, out, in / blocks]`, and its products
are summed.

    [out, in = 9216]  ->  4 x [out, 2304]

Blocks are for matrices alone: a lookup needs whole rows of the embedding.
"""

import math

import numpy as np

LONGEST_BLOCK = 2304
"""The longest `in` of a block. XLA 0.10 on a CPU with AVX-512 reads bf16 rows of 2304 at 53 GB/s,
of 3072 at 38, of 3584 at 33, and of 4096 at 2."""


def count_blocks(shape: tuple[int, ...], kind: str) -> int:
    """How many blocks a weight `[out, in]` is stored in; 1 means as it is."""
    length = shape[-1]
    if kind != "matrix" or length <= LONGEST_BLOCK:
        return 1
    fewest = math.ceil(length / LONGEST_BLOCK)
    for blocks in range(fewest, 2 * fewest + 1):
        if length % (64 * blocks) == 0:
            return blocks
    return 1


def packed_shape(shape: tuple[int, ...], kind: str) -> tuple[int, ...]:
    """The stored shape of a weight `[out, in]`: itself, or `[blocks, out, in / blocks]`."""
    blocks = count_blocks(shape, kind)
    return shape if blocks == 1 else (blocks, shape[0], shape[1] // blocks)


def pack(weight: np.ndarray, kind: str) -> np.ndarray:
    """A weight `[out, in]` in its stored layout."""
    blocks = count_blocks(weight.shape, kind)
    if blocks == 1:
        return weight
    out, length = weight.shape
    return np.ascontiguousarray(weight.reshape(out, blocks, length // blocks).swapaxes(0, 1))


def unpack(packed: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The weight `shape` back from its stored layout."""
    if packed.ndim == len(shape):
        return packed
    return packed.swapaxes(0, 1).reshape(shape)
