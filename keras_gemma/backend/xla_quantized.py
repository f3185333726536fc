"""Weights in 8 and 4 bits for XLA on CPU: a layout, one row as one loop, many rows slab by slab.

XLA on CPU fuses an operand of a product into one parallel loop that LLVM vectorises only if the
other operand is a single row. So the whole product of one row is written as that operand, and the
other one is a row of ones: `y[o] = sum(ones[l] * terms[o, l])`. Each lane `l` holds several weights
of output `o` times their activations, added by hand, and lanes next to each other are next to each
other in memory, so the loop loads, widens and multiplies whole vectors.

- 8 bits: a row `[in]` is `[slices, lanes]`, as it lies.
- 4 bits: a lane is a group, with its scale and zero. A group of 32 is 16 bytes; the first bytes of
  all groups come first, then the second ones. Low half bytes are the first half of a group.

      [out, in / 2] = [out, 16, groups]     byte j of group g: weights j and 16 + j of the group

  With no zeros, half bytes are 0 to 15 and zero is 8.

A matrix whose rows are longer than a few thousand is stored in blocks along `in`, as in
`packing.py`: the activations of a block then stay in the nearest cache. Measured, GB/s of stored
bytes on JAX at a bandwidth of 50 and 2304 x 9216: 43 against 32 without blocks in 8 bits, 28
against 11 in 4 bits; on TensorFlow 35 and 22.

More rows go to the library's product of bfloat16, a slab of the weight at a time, so that the
widened slab is read back from the cache. Knows nothing of frameworks but `keras.ops`.
"""

import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_gemma.backend import packing, quantized
from keras_gemma.backend.quantized import Quantized

SLICES = 16
"""Of a row in 8 bits. 8 slices read up to a quarter less, 18 or 4 a third."""

PASSES = 4
"""Up to so many rows a weight in 4 bits is read once a row: 12 billion weights a second at 4 rows,
against 4 where it is widened first, which XLA does in a loop that it does not vectorise well."""

SLAB = 1024
"""Rows of a weight that are widened at a time, at most: 4.7 MB of bfloat16 at 2304 columns."""


def _count_blocks(shape: tuple[int, int], kind: str, group_size: int = 1) -> int:
    blocks = packing.count_blocks(shape, kind)
    return blocks if shape[1] // blocks % group_size == 0 else 1


def spec(
    shape: tuple[int, int], kind: str, bits: int, group_size: int, zeros: bool = False
) -> Quantized:
    """Shape and dtype of each array of a stored weight `[out, in]`."""
    out, length = shape
    if bits == 8:
        return Quantized((packing.packed_shape(shape, kind), "int8"), ((out,), "float32"))
    if group_size % 2:
        raise ValueError(
            "`group_size` must be even: two weights of a group share a byte. "
            f"Received: {group_size}. Choose 32, 64 or 128."
        )
    blocks = _count_blocks(shape, kind, group_size)

    def stored(length: int) -> tuple[int, ...]:
        return (out, length) if blocks == 1 else (blocks, out, length // blocks)

    groups = stored(length // group_size), "bfloat16"
    return Quantized((stored(length // 2), "uint8"), groups, groups if zeros else None)


def pack(plain: Quantized, kind: str, bits: int) -> Quantized:
    """NumPy arrays in the plain form -> in the stored layout."""
    if bits == 8:
        return plain._replace(values=packing.pack(plain.values, kind))
    values, scales, zeros = plain
    out, groups = scales.shape
    size = values.shape[1] // groups
    blocks = _count_blocks(values.shape, kind, size)
    if zeros is None:
        values = values + np.int8(8)
    low, high = np.moveaxis(values.view("uint8").reshape(out, groups, 2, size // 2), 2, 0)
    pairs = (low | high << 4).reshape(out, blocks, groups // blocks, size // 2)
    pairs = pairs.transpose(1, 0, 3, 2).reshape(blocks, out, -1)

    def by_block(array: np.ndarray) -> np.ndarray:
        array = array.reshape(out, blocks, -1).swapaxes(0, 1)
        return packing.settle(array if blocks > 1 else array[0])

    return Quantized(
        packing.settle(pairs if blocks > 1 else pairs[0]),
        by_block(scales),
        None if zeros is None else by_block(zeros),
    )


def unpack(packed: Quantized, shape: tuple[int, int]) -> Quantized:
    """The way back."""
    values, scales, zeros = packed
    if values.dtype == np.int8:
        return packed._replace(values=packing.unpack(values, shape))
    out = shape[0]
    blocks = values.shape[0] if values.ndim == 3 else 1
    groups = scales.size // out
    pairs = values.reshape(blocks, out, -1, groups // blocks).transpose(1, 0, 3, 2)
    both = np.stack([pairs & 15, pairs >> 4], axis=-2).reshape(shape).view("int8")

    def whole(array: np.ndarray) -> np.ndarray:
        return packing.unpack(array, (out, groups))

    return Quantized(
        both - np.int8(8) if zeros is None else both,
        whole(scales),
        None if zeros is None else whole(zeros),
    )


def _in_8_bits(packed: Quantized) -> bool:
    return keras.backend.standardize_dtype(packed.values.dtype) == "int8"


def _halves(pairs: Any) -> tuple[Any, Any]:
    """Half bytes as float32. By way of int32: 26 GB/s, and 22 if masked as they are."""
    pairs = ops.cast(pairs, "int32")
    low, high = ops.bitwise_and(pairs, 15), ops.right_shift(pairs, 4)
    return ops.cast(low, "float32"), ops.cast(high, "float32")


def one_row(x: Any, packed: Quantized, ones: Callable[[int], Any]) -> Any:
    """`x [1, in]` -> `[1, out]`.

    Args:
        ones: makes a float32 row `[1, lanes]` of ones that the compiler takes for numbers.
    """
    values, scales, zeros = packed
    blocks = values.shape[0] if len(values.shape) == 3 else 1
    out, length = values.shape[-2:]
    wide = ops.cast(x, "float32")
    if _in_8_bits(packed):
        slices = math.gcd(length, SLICES)
        wide = ops.reshape(wide, (blocks, 1, slices, -1))
        values = ops.reshape(values, (blocks, out, slices, -1))
        terms = sum(ops.cast(values[:, :, j], "float32") * wide[:, :, j] for j in range(slices))
    else:
        groups = scales.shape[-1]
        half = length // groups
        wide = ops.swapaxes(ops.reshape(wide, (blocks, groups, 2 * half)), 1, 2)[:, None]
        values = ops.reshape(values, (blocks, out, half, groups))
        scales = ops.cast(ops.reshape(scales, (blocks, out, groups)), "float32")
        if zeros is None:
            zeros = 8.0
        else:
            zeros = ops.cast(ops.reshape(zeros, (blocks, out, groups)), "float32")
        terms = -zeros * ops.sum(wide, axis=2)
        for j in range(half):
            low, high = _halves(values[:, :, j])
            terms = terms + low * wide[:, :, j] + high * wide[:, :, half + j]
        terms = terms * scales
    lanes = terms.shape[-1]
    y = ops.matmul(ones(lanes), ops.transpose(ops.reshape(terms, (blocks * out, lanes))))
    if blocks > 1:
        y = ops.sum(ops.reshape(y, (blocks, out)), axis=0, keepdims=True)
    if _in_8_bits(packed):
        y = y * scales
    return ops.cast(y, x.dtype)


def few_rows(x: Any, packed: Quantized, ones: Callable[[int], Any]) -> Any:
    """`x [rows, in]` -> `[rows, out]`, one pass over the weight for each row."""
    return ops.concatenate([one_row(x[i : i + 1], packed, ones) for i in range(x.shape[0])])


def in_passes(rows: Any, packed: Quantized) -> bool:
    """Whether `few_rows` is faster than `many_rows`."""
    return isinstance(rows, int) and rows <= (1 if _in_8_bits(packed) else PASSES)


def _narrow(numbers: Any, dtype: str) -> Any:
    """Finite float32 in `dtype`; to bfloat16 by hand, where halves go away from zero.

    XLA on CPU minds numbers that are none: with a cast, a matrix takes a third longer to widen.
    """
    if dtype != "bfloat16":
        return ops.cast(numbers, dtype)
    bits = ops.right_shift(ops.view(numbers, "int32") + 0x8000, 16)
    return ops.view(ops.cast(bits, "int16"), "bfloat16")


def widen(packed: Quantized, dtype: str) -> list[Any]:
    """A stored weight, or rows of it, `[..., in]`, in `dtype`, as one or two parts of each row.

    8 bits: the values alone, for their scales belong to the sums. 4 bits: the low and the high half
    bytes, `[..., in / 2]` each, times their scales. `split` puts activations into the same order.
    """
    values, scales, zeros = packed
    if _in_8_bits(packed):
        return [ops.cast(values, dtype)]
    groups, shape = scales.shape[-1], ops.shape(values)
    values = ops.reshape(values, (*shape[:-1], shape[-1] // groups, groups))
    scales = ops.cast(scales, "float32")[..., None, :]
    zeros = 8.0 if zeros is None else ops.cast(zeros, "float32")[..., None, :]
    parts = ((half - zeros) * scales for half in _halves(values))
    return [ops.reshape(_narrow(part, dtype), shape) for part in parts]


def split(x: Any, packed: Quantized) -> list[Any]:
    """`x [rows, in]` -> the parts that `widen` makes of a weight, `[blocks, rows, length]` each."""
    values, scales, _ = packed
    blocks = values.shape[0] if len(values.shape) == 3 else 1
    length = x.shape[1]
    if _in_8_bits(packed):
        return [ops.swapaxes(ops.reshape(x, (-1, blocks, length // blocks)), 0, 1)]
    groups = scales.shape[-1]
    half = length // blocks // groups // 2
    x = ops.transpose(ops.reshape(x, (-1, blocks, groups, 2, half)), (3, 1, 0, 4, 2))
    x = ops.reshape(x, (2, blocks, -1, half * groups))
    return [x[0], x[1]]


def join(parts: list[Any], packed: Quantized) -> Any:
    """The way back from `split`: parts `[blocks, rows, length]` -> `[rows, in]`."""
    blocks, _, length = parts[0].shape
    if _in_8_bits(packed):
        return ops.reshape(ops.swapaxes(parts[0], 0, 1), (-1, blocks * length))
    groups = packed.scales.shape[-1]
    half = length // groups
    x = ops.reshape(ops.stack(parts), (2, blocks, -1, half, groups))
    return ops.reshape(ops.transpose(x, (2, 1, 4, 0, 3)), (-1, 2 * blocks * length))


def slab_size(out: int) -> int:
    """How many rows of a weight are widened at a time: of what divides `out`, the most."""
    return next(size for size in range(min(SLAB, out), 0, -1) if out % size == 0)


def turned(
    dy: Any,
    packed: Quantized,
    product: Callable[[Any, Any], Any],
    add_up: Callable[..., Any],
) -> Any:
    """`dy [rows, out]` times the weight as it lies -> `[rows, in]`: the gradient of a product.

    Args:
        product: of `dy [rows, slab]` and a slab `[blocks, slab, length]` -> float32 `[blocks,
            rows, length]`.
        add_up: applies a function to each element of some arrays, and adds up what it gives.
    """
    dtype = keras.backend.standardize_dtype(dy.dtype)
    rows, out = dy.shape
    slab = slab_size(out)
    in_8_bits = _in_8_bits(packed)
    if in_8_bits:
        dy = ops.cast(dy * packed.scales, dtype)

    def by_slab(array: Any) -> Any:
        array = ops.reshape(array, (-1, out // slab, slab, array.shape[-1]))
        return ops.swapaxes(array, 0, 1)

    def one(dy: Any, values: Any, *groups: Any) -> list[Any]:
        weight = Quantized(values, *(groups or (None,)))
        return [product(dy, part) for part in widen(weight, dtype)]

    stored = packed[:1] if in_8_bits else [array for array in packed if array is not None]
    dy = ops.swapaxes(ops.reshape(dy, (rows, out // slab, slab)), 0, 1)
    return ops.cast(join(add_up(one, dy, *map(by_slab, stored)), packed), dtype)


def many_rows(
    x: Any,
    packed: Quantized,
    product: Callable[[Any, Any], Any],
    each: Callable[..., Any],
    weight_first: bool,
) -> Any:
    """`x [rows, in]` -> `[rows, out]`, never with more than a slab of the weight widened.

    Args:
        product: of `x [rows, length]` and a slab `[slab, length]` -> float32 `[slab, rows]`, or
            `[rows, slab]` if not `weight_first`.
        each: applies a function to each element of some arrays, one after the other.
    """
    dtype = keras.backend.standardize_dtype(x.dtype)
    rows, out = ops.shape(x)[0], packed.values.shape[-2]
    slab = slab_size(out)
    parts = split(x, packed)
    blocks, slabs = parts[0].shape[0], out // slab
    in_8_bits = _in_8_bits(packed)

    def by_slab(array: Any) -> Any:
        return ops.reshape(array, (blocks * slabs, slab, array.shape[-1]))

    def one(block: Any, values: Any, *groups: Any) -> Any:
        slab = Quantized(values, *(groups or (None,)))
        both = zip(parts, widen(slab, dtype), strict=True)
        return sum(product(part[block], weight) for part, weight in both)

    block_of = ops.convert_to_tensor(np.repeat(np.arange(blocks, dtype="int32"), slabs))
    stored = packed[:1] if in_8_bits else [array for array in packed if array is not None]
    y = each(one, block_of, *map(by_slab, stored))
    if weight_first:
        y = ops.transpose(ops.sum(ops.reshape(y, (blocks, out, rows)), axis=0))
    else:
        y = ops.sum(ops.reshape(y, (blocks, slabs, rows, slab)), axis=0)
        y = ops.reshape(ops.swapaxes(y, 0, 1), (rows, out))
    return ops.cast(y * packed.scales if in_8_bits else y, dtype)


def embed(ids: Any, packed: Quantized, dtype: str) -> Any:
    """Rows `ids [...]` of the weight `[V, D]` -> `[..., D]` in `dtype`."""
    if _in_8_bits(packed):
        return quantized.embed(ids, packed, dtype)
    rows = (None if array is None else ops.take(array, ids, axis=0) for array in packed)
    groups, half = packed.scales.shape[-1], packed.values.shape[-1]
    places = ops.shape(ids)
    parts = widen(Quantized(*rows), dtype)
    parts = [ops.reshape(part, (*places, half // groups, groups)) for part in parts]
    numbers = ops.swapaxes(ops.concatenate(parts, axis=-2), -1, -2)
    return ops.reshape(numbers, (*places, 2 * half))
