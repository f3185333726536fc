"""Int8 and int4 weights for XLA on CPU: one row as one loop, many rows chunk by chunk.

XLA on CPU fuses an operand of a product into one parallel loop, which LLVM vectorizes only if the
other operand is a single row. A one-row product is therefore written as that operand, times a row
of ones: `y[o] = sum(ones[l] * terms[o, l])`. Each lane `l` explicitly sums several weights of
output `o` times their activations. Adjacent lanes are adjacent in memory, so the loop loads,
converts and multiplies whole vectors.

- 8 bits: a row `[in]` is `[slices, lanes]`, in the same order.
- 4 bits: a lane is a group, with its scale and zero point. A group of 32 is 16 bytes. The first
  bytes of all groups come first, then the second ones. Low half bytes are the first half of a
  group.

      [out, in / 2] = [out, 16, groups]     byte j of group g: weights j and 16 + j of the group

  Without zero points, half bytes are 0 to 15 and 8 represents zero.

A matrix whose rows are longer than a few thousand is stored in blocks along `in`, as in
`packing.py`: the activations of a block then stay in the nearest cache. Measured, GB/s of stored
bytes on JAX at a bandwidth of 50 and 2304 x 9216: 43 against 32 without blocks in 8 bits, 28
against 11 in 4 bits; on TensorFlow 35 and 22.

More rows use the library's bfloat16 product, one chunk of the weight at a time, so that the
dequantized chunk is read back from the cache. Knows no framework, only `keras.ops`.
`backend/quantized.py` documents `spec`, `pack`, `unpack` and `embed`.
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
"""Slices of an int8 row. 8 slices are up to a quarter slower, 18 or 4 slices a third."""

MAX_ROW_PASSES = 4
"""Maximum rows for which an int4 weight is read once per row. At 4 rows this reads 12 billion
weights per second, and 4 billion if the weight is dequantized first, which XLA vectorizes
poorly."""

MAX_CHUNK_ROWS = 1024
"""Maximum rows of a weight that are dequantized at a time: 4.7 MB of bfloat16 at 2304 columns."""


def _count_blocks(shape: tuple[int, int], kind: str, group_size: int = 1) -> int:
    blocks = packing.count_blocks(shape, kind)
    return blocks if shape[1] // blocks % group_size == 0 else 1


def spec(
    shape: tuple[int, int], kind: str, bits: int, group_size: int, zero_points: bool = False
) -> Quantized:
    out, length = shape
    if bits == 8:
        return Quantized((packing.packed_shape(shape, kind), "int8"), ((out,), "float32"))
    if group_size % 2:
        raise ValueError(
            "`group_size` must be even, because two weights of a group share a byte. Choose 32, 64 "
            f"or 128. Received: group_size={group_size}"
        )
    blocks = _count_blocks(shape, kind, group_size)

    def stored(length: int) -> tuple[int, ...]:
        return (out, length) if blocks == 1 else (blocks, out, length // blocks)

    groups = stored(length // group_size), "bfloat16"
    return Quantized((stored(length // 2), "uint8"), groups, groups if zero_points else None)


def pack(plain: Quantized, kind: str, bits: int) -> Quantized:
    if bits == 8:
        return plain._replace(values=packing.pack(plain.values, kind))
    values, scales, zero_points = plain
    out, groups = scales.shape
    size = values.shape[1] // groups
    blocks = _count_blocks(values.shape, kind, size)
    if zero_points is None:
        values = values + np.int8(8)
    low, high = np.moveaxis(values.view("uint8").reshape(out, groups, 2, size // 2), 2, 0)
    pairs = (low | high << 4).reshape(out, blocks, groups // blocks, size // 2).swapaxes(2, 3)

    def by_block(array: np.ndarray) -> np.ndarray:
        array = array.reshape(out, blocks, -1).swapaxes(0, 1)
        return packing.as_aligned(array if blocks > 1 else array[0])

    return Quantized(pairs, scales, zero_points).map(by_block)


def unpack(packed: Quantized, shape: tuple[int, int]) -> Quantized:
    values, scales, zero_points = packed
    if values.dtype == np.int8:
        return packed._replace(values=packing.unpack(values, shape))
    out = shape[0]
    blocks = values.shape[0] if values.ndim == 3 else 1
    groups = scales.size // out
    pairs = values.reshape(blocks, out, -1, groups // blocks).transpose(1, 0, 3, 2)
    both = np.stack([pairs & 15, pairs >> 4], axis=-2).reshape(shape).view("int8")
    both = both - np.int8(8) if zero_points is None else both
    # Leaves `both` as it is, because it has no blocks.
    return Quantized(both, scales, zero_points).map(lambda a: packing.unpack(a, (out, groups)))


def _in_8_bits(packed: Quantized) -> bool:
    return keras.backend.standardize_dtype(packed.values.dtype) == "int8"


def _halves(pairs: Any) -> tuple[Any, Any]:
    """Returns low and high half bytes in float32. Via int32: 26 GB/s instead of 22."""
    pairs = ops.cast(pairs, "int32")
    low, high = ops.bitwise_and(pairs, 15), ops.right_shift(pairs, 4)
    return ops.cast(low, "float32"), ops.cast(high, "float32")


def one_row(x: Any, packed: Quantized, ones: Callable[[int], Any]) -> Any:
    """Multiplies one row `x [1, in]` by the weight -> `[1, out]`.

    `ones` returns a float32 row `[1, lanes]` of ones that the compiler cannot simplify.
    """
    values, scales, zero_points = packed
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
        if zero_points is None:
            zero_points = 8.0
        else:
            zero_points = ops.cast(ops.reshape(zero_points, (blocks, out, groups)), "float32")
        terms = -zero_points * ops.sum(wide, axis=2)
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
    """Multiplies `x [rows, in]` -> `[rows, out]`, with one pass over the weight per row."""
    return ops.concatenate([one_row(x[i : i + 1], packed, ones) for i in range(x.shape[0])])


def prefers_row_passes(rows: Any, packed: Quantized) -> bool:
    """Returns True if `few_rows` is faster than `many_rows`."""
    return isinstance(rows, int) and rows <= (1 if _in_8_bits(packed) else MAX_ROW_PASSES)


def _narrow(numbers: Any, dtype: str) -> Any:
    """Rounds finite float32 to `dtype`. Conversion to bfloat16 rounds halves away from zero.

    A cast would handle NaN too, and converting a matrix would take a third longer on XLA on CPU.
    """
    if dtype != "bfloat16":
        return ops.cast(numbers, dtype)
    bits = ops.right_shift(ops.view(numbers, "int32") + 0x8000, 16)
    return ops.view(ops.cast(bits, "int16"), "bfloat16")


def dequantize(packed: Quantized, dtype: str) -> list[Any]:
    """Dequantizes a stored weight, or rows of it, to one or two parts per row in `dtype`.

    8 bits: only the values `[..., in]`, because the sums are scaled instead. 4 bits: the low and
    the high half bytes, `[..., in / 2]` each, scaled. `split` gives activations the same order.
    """
    values, scales, zero_points = packed
    if _in_8_bits(packed):
        return [ops.cast(values, dtype)]
    groups, shape = scales.shape[-1], ops.shape(values)
    values = ops.reshape(values, (*shape[:-1], shape[-1] // groups, groups))
    scales = ops.cast(scales, "float32")[..., None, :]
    zero_points = 8.0 if zero_points is None else ops.cast(zero_points, "float32")[..., None, :]
    parts = ((half - zero_points) * scales for half in _halves(values))
    return [ops.reshape(_narrow(part, dtype), shape) for part in parts]


def split(x: Any, packed: Quantized) -> list[Any]:
    """Splits `x [rows, in]` into the parts of `dequantize`, `[blocks, rows, length]` each."""
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
    """Inverse of `split`: parts `[blocks, rows, length]` -> `[rows, in]`."""
    blocks, _, length = parts[0].shape
    if _in_8_bits(packed):
        return ops.reshape(ops.swapaxes(parts[0], 0, 1), (-1, blocks * length))
    groups = packed.scales.shape[-1]
    half = length // groups
    x = ops.reshape(ops.stack(parts), (2, blocks, -1, half, groups))
    return ops.reshape(ops.transpose(x, (2, 1, 4, 0, 3)), (-1, 2 * blocks * length))


def chunk_size(out: int) -> int:
    """Returns the rows of a chunk: the largest divisor of `out` up to `MAX_CHUNK_ROWS`."""
    return next(size for size in range(min(MAX_CHUNK_ROWS, out), 0, -1) if out % size == 0)


def many_rows(
    x: Any,
    packed: Quantized,
    product: Callable[[Any, Any], Any],
    each: Callable[..., Any],
    weight_first: bool,
) -> Any:
    """Multiplies `x [rows, in]` -> `[rows, out]`, dequantizing one chunk of the weight at a time.

    `product` multiplies `x [rows, length]` by a chunk `[chunk, length]` -> float32 `[chunk, rows]`
    if `weight_first`, otherwise `[rows, chunk]`. `each` applies a function to the elements of a
    tuple of arrays, in order.
    """
    dtype = keras.backend.standardize_dtype(x.dtype)
    rows, out = ops.shape(x)[0], packed.values.shape[-2]
    chunk = chunk_size(out)
    parts = split(x, packed)
    blocks, chunks = parts[0].shape[0], out // chunk
    in_8_bits = _in_8_bits(packed)

    def by_chunk(array: Any) -> Any:
        return ops.reshape(array, (blocks * chunks, chunk, array.shape[-1]))

    def one(elements: tuple[Any, ...]) -> Any:
        block, values, *groups = elements
        chunk = Quantized(values, *(groups or (None,)))
        both = zip(parts, dequantize(chunk, dtype), strict=True)
        return sum(product(part[block], weight) for part, weight in both)

    block_of = ops.convert_to_tensor(np.repeat(np.arange(blocks, dtype="int32"), chunks))
    stored = packed[:1] if in_8_bits else [array for array in packed if array is not None]
    y = each(one, (block_of, *map(by_chunk, stored)))
    if weight_first:
        y = ops.transpose(ops.sum(ops.reshape(y, (blocks, out, rows)), axis=0))
    else:
        y = ops.sum(ops.reshape(y, (blocks, chunks, rows, chunk)), axis=0)
        y = ops.reshape(ops.swapaxes(y, 0, 1), (rows, out))
    return ops.cast(y * packed.scales if in_8_bits else y, dtype)


def embed(ids: Any, packed: Quantized, dtype: str) -> Any:
    if _in_8_bits(packed):
        return quantized.embed(ids, packed, dtype)
    groups, half = packed.scales.shape[-1], packed.values.shape[-1]
    places = ops.shape(ids)
    parts = dequantize(packed.map(lambda array: ops.take(array, ids, axis=0)), dtype)
    parts = [ops.reshape(part, (*places, half // groups, groups)) for part in parts]
    numbers = ops.swapaxes(ops.concatenate(parts, axis=-2), -1, -2)
    return ops.reshape(numbers, (*places, 2 * half))
