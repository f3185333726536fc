"""Int8 and int4 weights for XLA on CPU: one row as one loop, many rows chunk by chunk.

XLA on CPU fuses an operand of a product into one parallel loop, which LLVM vectorizes only if the
other operand is a single row. A one-row product is therefore written as that operand, times a row
of ones: `y[o] = sum(ones[l] * terms[o, l])`. Each lane `l` explicitly sums several weights of
output `o` times their activations. Adjacent lanes are adjacent in memory, so the loop loads,
converts and multiplies whole vectors.

- Without groups: a row `[in]` is `[slices, lanes]`, in the same order.
- With groups: a lane is a group, with its scale and zero point or minimum. In 4 bits a group of 32
  is 16 bytes, in 8 bits 32. The first bytes of all groups come first, then the second ones. Low
  half bytes are the first half of a group.

      [out, in / 2] = [out, 16, groups]     byte j of group g: weights j and 16 + j of the group
      [out, in]     = [out, 32, groups]     in 8 bits: weight j

  Signed half bytes are stored as 0 to 15, and 8 represents zero. In 8 bits the scales are float32,
  and a row keeps its order, [out, groups, 32], if the number of groups does not fill vectors: at
  20 groups a lane for each of the 32 numbers takes 1.3 ms instead of 2.8.

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
from keras_gemma.backend.quantized import Layout, Quantized

MIN_VECTOR = 8
"""Divisor of the number of groups for which groups are lanes in 8 bits. Milliseconds for 42 million
numbers, if groups are lanes and if not: 20 groups 2.8 and 1.3, 36 1.4 and 1.3, 64 1.1 and 1.5, 72
2.3 and 2.4."""

SLICES = 16
"""Slices of an int8 row. 8 slices are up to a quarter slower, 18 or 4 slices a third."""

MAX_ROW_PASSES = 4
"""Maximum rows for which a weight with groups is read once per row. At 4 rows this reads 12 billion
weights per second, and 4 billion if the weight is dequantized first, which XLA vectorizes
poorly."""

MAX_CHUNK_ROWS = 1024
"""Maximum rows of a weight that are dequantized at a time: 4.7 MB of bfloat16 at 2304 columns."""


def _count_blocks(shape: tuple[int, int], kind: str, group_size: int = 1) -> int:
    blocks = packing.count_blocks(shape, kind)
    return blocks if shape[1] // blocks % group_size == 0 else 1


def spec(shape: tuple[int, int], kind: str, layout: Layout) -> Quantized:
    out, length = shape
    group_size = layout.group_size
    if group_size is None:
        return Quantized((packing.packed_shape(shape, kind), "int8"), ((out,), "float32"))
    if group_size % 2:
        raise ValueError(
            "`group_size` must be even, because two weights of a group share a byte. Choose 32, 64 "
            f"or 128. Received: group_size={group_size}"
        )
    blocks = _count_blocks(shape, kind, group_size)
    if layout.bits == 8:
        layout = layout._replace(scale_dtype="float32")

    def stored(length: int) -> tuple[int, ...]:
        return (out, length) if blocks == 1 else (blocks, out, length // blocks)

    values = (stored(length), "int8") if layout.bits == 8 else (stored(length // 2), "uint8")
    return layout.with_groups(values, stored(length // group_size))


def pack(plain: Quantized, kind: str, bits: int) -> Quantized:
    if not plain.has_groups:
        return plain._replace(values=packing.pack(plain.values, kind))
    values = plain.values
    out, groups = plain.scales.shape
    if bits == 8:
        of_groups = plain._replace(values=None).map(lambda array: array.astype("float32"))
        plain = of_groups._replace(values=values)
    blocks = _count_blocks(values.shape, kind, values.shape[1] // groups)
    if bits == 4:
        if plain.is_signed:
            values = values + np.int8(8)
        halves = values.view("uint8").reshape(out, groups, 2, -1)
        values = halves[:, :, 0] | halves[:, :, 1] << 4
    if _has_group_lanes(bits, groups // blocks):
        values = values.reshape(out, blocks, groups // blocks, -1).swapaxes(2, 3)

    def by_block(array: np.ndarray) -> np.ndarray:
        array = array.reshape(out, blocks, -1).swapaxes(0, 1)
        return packing.as_aligned(array if blocks > 1 else array[0])

    return plain._replace(values=values).map(by_block)


def unpack(packed: Quantized, shape: tuple[int, int]) -> Quantized:
    values = packed.values
    if not packed.has_groups:
        return packed._replace(values=packing.unpack(values, shape))
    out = shape[0]
    blocks = values.shape[0] if values.ndim == 3 else 1
    groups = packed.scales.size // out
    if _is_by_group_lanes(packed):
        values = values.reshape(blocks, out, -1, groups // blocks).transpose(1, 0, 3, 2)
    else:
        values = packing.unpack(values, shape)
    if values.dtype != np.int8:
        values = np.stack([values & 15, values >> 4], axis=-2).view("int8")
        if packed.is_signed:
            values = values - np.int8(8)
    of_groups = packed._replace(values=None).map(lambda a: packing.unpack(a, (out, groups)))
    return of_groups._replace(values=values.reshape(shape))


def _has_group_lanes(bits: int, groups: int) -> bool:
    """Returns True if lanes of a weight with this many groups per block are groups."""
    return bits == 4 or groups % MIN_VECTOR == 0


def _is_by_group_lanes(packed: Quantized) -> bool:
    return _has_group_lanes(8 // _halves_per_byte(packed), packed.scales.shape[-1])


def _halves_per_byte(packed: Quantized) -> int:
    return 1 if keras.backend.standardize_dtype(packed.values.dtype) == "int8" else 2


def _numbers(packed: Quantized, values: Any) -> list[Any]:
    """Returns bytes of groups in float32; in 4 bits low and high half bytes.

    Via int32: 26 GB/s instead of 22.
    """
    if _halves_per_byte(packed) == 1:
        return [ops.cast(values, "float32")]
    values = ops.cast(values, "int32")
    halves = values & 15, ops.right_shift(values, 4)
    return [ops.cast(half, "float32") for half in halves]


def _zero_points(packed: Quantized) -> Any:
    """Returns the numbers that represent zero in a weight with groups: an array, 8 or 0."""
    if packed.zero_points is not None:
        return ops.cast(packed.zero_points, "float32")
    return 8.0 if packed.is_signed and _halves_per_byte(packed) == 2 else 0.0


def one_row(x: Any, packed: Quantized, ones: Callable[[int], Any]) -> Any:
    """Multiplies one row `x [1, in]` by the weight -> `[1, out]`.

    `ones` returns a float32 row `[1, lanes]` of ones that the compiler cannot simplify.
    """
    values, scales = packed[:2]
    blocks = values.shape[0] if len(values.shape) == 3 else 1
    out, length = values.shape[-2:]
    wide = ops.cast(x, "float32")
    if not packed.has_groups:
        slices = math.gcd(length, SLICES)
        wide = ops.reshape(wide, (blocks, 1, slices, -1))
        values = ops.reshape(values, (blocks, out, slices, -1))
        terms = sum(ops.cast(values[:, :, j], "float32") * wide[:, :, j] for j in range(slices))
    else:
        terms = _terms_of_groups(wide, packed, blocks)
    lanes = terms.shape[-1]
    y = ops.matmul(ones(lanes), ops.transpose(ops.reshape(terms, (blocks * out, lanes))))
    if blocks > 1:
        y = ops.sum(ops.reshape(y, (blocks, out)), axis=0, keepdims=True)
    if not packed.has_groups:
        y = y * scales
    return ops.cast(y, x.dtype)


def _terms_of_groups(wide: Any, packed: Quantized, blocks: int) -> Any:
    """Returns terms `[blocks, out, lanes]` whose sums over lanes are the products of one row."""
    values, scales, _, minimums = packed
    out, length = values.shape[-2:]
    groups, parts = scales.shape[-1], _halves_per_byte(packed)
    size = length // groups

    def of_groups(array: Any) -> Any:
        return ops.reshape(ops.cast(array, "float32"), (blocks, out, groups))

    wide = ops.reshape(wide, (blocks, groups, parts * size))
    if not _is_by_group_lanes(packed):  # without zero points, because it has 8 bits
        values, scales = ops.reshape(values, (blocks, out, groups, size)), of_groups(scales)
        minimums = None if minimums is None else of_groups(minimums)
        sums = [0.0, 0.0]  # two independent sums keep the processor busy
        for g in range(groups):
            x, one = wide[:, None, g], slice(g, g + 1)
            term = ops.cast(values[:, :, g], "float32") * x * scales[:, :, one]
            if minimums is not None:
                term = term + minimums[:, :, one] * x
            sums[g % 2] = sums[g % 2] + term
        return sums[0] + sums[1]
    values = ops.reshape(values, (blocks, out, size, groups))
    wide = ops.swapaxes(wide, 1, 2)[:, None]
    total = ops.sum(wide, axis=2)
    zero_points = _zero_points(packed)
    if packed.zero_points is not None:
        zero_points = of_groups(zero_points)
    terms = -zero_points * total
    for j in range(size):
        for part, numbers in enumerate(_numbers(packed, values[:, :, j])):
            terms = terms + numbers * wide[:, :, part * size + j]
    terms = terms * of_groups(scales)
    return terms if minimums is None else terms + of_groups(minimums) * total


def few_rows(x: Any, packed: Quantized, ones: Callable[[int], Any]) -> Any:
    """Multiplies `x [rows, in]` -> `[rows, out]`, with one pass over the weight per row."""
    return ops.concatenate([one_row(x[i : i + 1], packed, ones) for i in range(x.shape[0])])


def prefers_row_passes(rows: Any, packed: Quantized) -> bool:
    """Returns True if `few_rows` is faster than `many_rows`."""
    return isinstance(rows, int) and rows <= (MAX_ROW_PASSES if packed.has_groups else 1)


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

    `packed` has the arrays of `chunk_arrays`. Without groups: only the values `[..., in]`, because
    the sums are scaled instead. With groups: the scaled weights; in 4 bits those of the low and of
    the high half bytes, `[..., in / 2]` each. `split` gives activations the same order.
    """
    values, scales, _, minimums = packed
    if scales is None:
        return [ops.cast(values, dtype)]
    groups, shape = scales.shape[-1], ops.shape(values)
    by_group_lanes = _is_by_group_lanes(packed)
    size = shape[-1] // groups
    values = ops.reshape(
        values, (*shape[:-1], size, groups) if by_group_lanes else (*shape[:-1], groups, size)
    )

    def of_groups(array: Any) -> Any:
        return ops.expand_dims(ops.cast(array, "float32"), -2 if by_group_lanes else -1)

    zero_points = _zero_points(packed)
    if packed.zero_points is not None:
        zero_points = of_groups(zero_points)
    parts = [(part - zero_points) * of_groups(scales) for part in _numbers(packed, values)]
    if minimums is not None:
        parts = [part + of_groups(minimums) for part in parts]
    return [ops.reshape(_narrow(part, dtype), shape) for part in parts]


def split(x: Any, packed: Quantized) -> list[Any]:
    """Splits `x [rows, in]` into the parts of `dequantize`, `[blocks, rows, length]` each."""
    values = packed.values
    blocks = values.shape[0] if len(values.shape) == 3 else 1
    length = x.shape[1]
    if not (packed.has_groups and _is_by_group_lanes(packed)):
        return [ops.swapaxes(ops.reshape(x, (-1, blocks, length // blocks)), 0, 1)]
    groups, parts = packed.scales.shape[-1], _halves_per_byte(packed)
    size = length // blocks // groups // parts
    x = ops.transpose(ops.reshape(x, (-1, blocks, groups, parts, size)), (3, 1, 0, 4, 2))
    x = ops.reshape(x, (parts, blocks, -1, size * groups))
    return [x[part] for part in range(parts)]


def join(parts: list[Any], packed: Quantized) -> Any:
    """Inverse of `split`: parts `[blocks, rows, length]` -> `[rows, in]`."""
    blocks, _, length = parts[0].shape
    if not (packed.has_groups and _is_by_group_lanes(packed)):
        return ops.reshape(ops.swapaxes(parts[0], 0, 1), (-1, blocks * length))
    groups, count = packed.scales.shape[-1], len(parts)
    x = ops.reshape(ops.stack(parts), (count, blocks, -1, length // groups, groups))
    return ops.reshape(ops.transpose(x, (2, 1, 4, 0, 3)), (-1, count * blocks * length))


def chunk_size(out: int) -> int:
    """Returns the rows of a chunk: the largest divisor of `out` up to `MAX_CHUNK_ROWS`."""
    return next(size for size in range(min(MAX_CHUNK_ROWS, out), 0, -1) if out % size == 0)


def chunk_arrays(packed: Quantized) -> dict[str, Any]:
    """Returns the arrays by name that `dequantize` needs for a chunk."""
    arrays = packed.by_file_name()
    return arrays if packed.has_groups else {"values": arrays["values"]}


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

    def by_chunk(array: Any) -> Any:
        return ops.reshape(array, (blocks * chunks, chunk, array.shape[-1]))

    def one(elements: tuple[Any, ...]) -> Any:
        block, *arrays = elements
        chunk = Quantized.from_file_names(dict(zip(stored, arrays, strict=True)))
        both = zip(parts, dequantize(chunk, dtype), strict=True)
        return sum(product(part[block], weight) for part, weight in both)

    block_of = ops.repeat(ops.arange(blocks, dtype="int32"), chunks)
    stored = chunk_arrays(packed)
    y = each(one, (block_of, *map(by_chunk, stored.values())))
    if weight_first:
        y = ops.transpose(ops.sum(ops.reshape(y, (blocks, out, rows)), axis=0))
    else:
        y = ops.sum(ops.reshape(y, (blocks, chunks, rows, chunk)), axis=0)
        y = ops.reshape(ops.swapaxes(y, 0, 1), (rows, out))
    return ops.cast(y if packed.has_groups else y * packed.scales, dtype)


def embed(ids: Any, packed: Quantized, dtype: str) -> Any:
    if not packed.has_groups:
        return quantized.embed(ids, packed, dtype)
    groups, length = packed.scales.shape[-1], packed.values.shape[-1]
    places = ops.shape(ids)
    parts = dequantize(packed.map(lambda array: ops.take(array, ids, axis=0)), dtype)
    if not _is_by_group_lanes(packed):
        return parts[0]
    parts = [ops.reshape(part, (*places, length // groups, groups)) for part in parts]
    numbers = ops.swapaxes(ops.concatenate(parts, axis=-2), -1, -2)
    return ops.reshape(numbers, (*places, len(parts) * length))
