"""A weight in 8 or 4 bits: the arrays it is made of, and what a product with it means.

`weight[o, i] = scales[o, g] * (values[o, i] - zeros[o, g])`, where `g = i // group_size`; in 8 bits
a row is one group. The functions here are plain and right in `keras.ops`; a backend that knows
faster forms has its own, and its own layout.
"""

from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops


class Quantized(NamedTuple):
    """A weight `[out, in]`. How many bits it has, `values` says: int8 holds 8, all others 4.

    A backend may store 4 bits in another layout, such as words of eight.
    In the plain form, that of files and of the mathematics, `values` is int8 `[out, in]` for both:
    -127 to 127, or -8 to 7, or, with zero points, 0 to 15.
    """

    values: Any  # int8 [out, in]; uint8 [out, in / 2], low half bytes are the first half of a row
    scales: Any  # float32 [out] in 8 bits; bfloat16 [out, in / group_size] in 4
    zeros: Any = None  # like the scales of 4 bits; None where zero stands for zero


def spec(
    shape: tuple[int, int], kind: str, bits: int, group_size: int, zeros: bool = False
) -> Quantized:
    """Shape and dtype of each array of a stored weight `[out, in]`."""
    out, length = shape
    if bits == 8:
        return Quantized((shape, "int8"), ((out,), "float32"))
    groups = ((out, length // group_size), "bfloat16")
    return Quantized(((out, length // 2), "uint8"), groups, groups if zeros else None)


def pack(plain: Quantized, kind: str, bits: int) -> Quantized:
    """NumPy arrays in the plain form -> in the stored layout."""
    if bits == 8:
        return plain
    low, high = np.split(plain.values.view("uint8") & 15, 2, axis=1)
    return plain._replace(values=low | high << 4)


def unpack(packed: Quantized, shape: tuple[int, int]) -> Quantized:
    """The way back."""
    if packed.values.dtype == np.int8:
        return packed
    values = np.concatenate([packed.values & 15, packed.values >> 4], axis=1).view("int8")
    if packed.zeros is None:
        values = (values ^ 8) - 8  # 15 is -1
    return packed._replace(values=values)


def dequantize(packed: Quantized, dtype: str) -> Any:
    """Rows of a stored weight `[..., in]` in `dtype`."""
    values, scales, zeros = packed
    if keras.backend.standardize_dtype(values.dtype) == "int8":
        return ops.cast(ops.cast(values, "float32") * scales[..., None], dtype)
    low, high = ops.bitwise_and(values, 15), ops.right_shift(values, 4)
    numbers = ops.cast(ops.concatenate([low, high], axis=-1), "float32")
    if zeros is None:
        numbers = ops.where(numbers > 7, numbers - 16, numbers)
    rows, groups = ops.shape(numbers)[:-1], scales.shape[-1]
    numbers = ops.reshape(numbers, (*rows, groups, numbers.shape[-1] // groups))
    if zeros is not None:
        numbers = numbers - ops.cast(zeros, "float32")[..., None]
    numbers = numbers * ops.cast(scales, "float32")[..., None]
    return ops.cast(ops.reshape(numbers, (*rows, groups * numbers.shape[-1])), dtype)


def matmul(x: Any, packed: Quantized) -> Any:
    """`x [..., in]` times the weight -> `[..., out]`."""
    weight = dequantize(packed, keras.backend.standardize_dtype(x.dtype))
    return ops.matmul(x, ops.transpose(weight))


def matmul_back(dy: Any, packed: Quantized) -> Any:
    """The gradient of `matmul` with respect to `x`: `dy [..., out]` times the weight, turned."""
    return ops.matmul(dy, dequantize(packed, keras.backend.standardize_dtype(dy.dtype)))


def embed(ids: Any, packed: Quantized, dtype: str) -> Any:
    """Rows `ids [...]` of the weight `[V, D]` -> `[..., D]` in `dtype`."""
    rows = (None if array is None else ops.take(array, ids, axis=0) for array in packed)
    return dequantize(Quantized(*rows), dtype)
