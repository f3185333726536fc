"""Reference implementation of int8 and int4 weights in plain `keras.ops`.

`weight[o, i] = scales[o, g] * (values[o, i] - zero_points[o, g]) + minimums[o, g]` with
`g = i // group_size`. Without groups, each row has one scale `[out]`. A weight has zero points,
minimums or neither. A backend may have its own layout and faster functions.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

FILE_NAMES = ("values", "scales", "zeros", "minimums")
"""Names of the arrays of a `Quantized` in files."""


class Quantized(NamedTuple):
    """Quantized weight `[out, in]`. A stored weight has 8 bits if `values` is int8, otherwise 4.

    A backend may store groups in its own layout, such as words of eight 4-bit numbers. In the plain
    form, which files use, `values` is int8 `[out, in]`: -128 to 127 in 8 bits, -8 to 7 in 4 bits,
    or 0 to 15 with zero points or minimums.
    """

    values: Any  # int8 [out, in]; uint8 [out, in / 2], low half bytes are the first half of a row
    scales: Any  # float32 [out], or [out, in / group_size] with groups
    zero_points: Any = None  # like the scales of groups; None if all zero points are 0
    minimums: Any = None  # like the scales of groups; None if all minimums are 0

    @property
    def has_groups(self) -> bool:
        """True if the numbers of a row have several scales."""
        return len(self.scales.shape) > 1

    @property
    def is_signed(self) -> bool:
        """True if 4-bit values are -8 to 7."""
        return self.zero_points is None and self.minimums is None

    def by_file_name(self) -> dict[str, Any]:
        """Returns the arrays that are not `None` by their names in files."""
        pairs = zip(FILE_NAMES, self, strict=True)
        return {name: array for name, array in pairs if array is not None}

    def map(self, function: Callable[[Any], Any]) -> "Quantized":
        """Returns the results of `function` for the arrays that are not `None`."""
        return Quantized(*(None if array is None else function(array) for array in self))

    @classmethod
    def from_file_names(cls, arrays: Mapping[str, Any]) -> "Quantized":
        """Inverse of `by_file_name`."""
        return cls(*(arrays.get(name) for name in FILE_NAMES))


class Layout(NamedTuple):
    """Precision of a quantized weight."""

    bits: int
    group_size: int | None
    """Numbers of a row that share a scale. `None` means the whole row, with a float32 scale."""
    zero_points: bool = False
    minimums: bool = False
    scale_dtype: str = "bfloat16"
    """Dtype of the scales, zero points and minimums of groups."""

    def with_groups(self, values: Any, shape: tuple[int, ...]) -> Quantized:
        """Returns shape and dtype of each array, if the arrays of groups have this shape."""
        entry = (shape, self.scale_dtype)
        zero_points, minimums = (entry if has else None for has in self[2:4])
        return Quantized(values, entry, zero_points, minimums)


def spec(shape: tuple[int, int], kind: str, layout: Layout) -> Quantized:
    """Returns shape and dtype of each array of a stored weight `[out, in]`."""
    out, length = shape
    values = (shape, "int8") if layout.bits == 8 else ((out, length // 2), "uint8")
    if layout.group_size is None:
        return Quantized(values, ((out,), "float32"))
    return layout.with_groups(values, (out, length // layout.group_size))


def pack(plain: Quantized, kind: str, bits: int) -> Quantized:
    """Packs NumPy arrays from the plain form into the stored layout."""
    if bits == 8:
        return plain
    low, high = np.split(plain.values.view("uint8") & 15, 2, axis=1)
    return plain._replace(values=low | high << 4)


def unpack(packed: Quantized, shape: tuple[int, int]) -> Quantized:
    """Inverse of `pack`."""
    if packed.values.dtype == np.int8:
        return packed
    values = np.concatenate([packed.values & 15, packed.values >> 4], axis=1).view("int8")
    if packed.is_signed:
        values = (values ^ 8) - 8  # 15 is -1
    return packed._replace(values=values)


def dequantize(packed: Quantized, dtype: str) -> Any:
    """Returns rows of a stored weight, `[..., in]` in `dtype`."""
    values, scales, zero_points, minimums = packed
    if keras.backend.standardize_dtype(values.dtype) == "int8":
        numbers = ops.cast(values, "float32")
    else:
        low, high = values & 15, ops.right_shift(values, 4)
        numbers = ops.cast(ops.concatenate([low, high], axis=-1), "float32")
        if packed.is_signed:
            numbers = ops.where(numbers > 7, numbers - 16, numbers)
    rows = ops.shape(numbers)[:-1]
    groups = scales.shape[-1] if len(scales.shape) == len(numbers.shape) else 1

    def of_groups(array: Any) -> Any:
        return ops.reshape(ops.cast(array, "float32"), (*rows, groups, 1))

    numbers = ops.reshape(numbers, (*rows, groups, numbers.shape[-1] // groups))
    if zero_points is not None:
        numbers = numbers - of_groups(zero_points)
    numbers = numbers * of_groups(scales)
    if minimums is not None:
        numbers = numbers + of_groups(minimums)
    return ops.cast(ops.reshape(numbers, (*rows, groups * numbers.shape[-1])), dtype)


def matmul(x: Any, packed: Quantized) -> Any:
    """Multiplies `x [..., in]` by the weight -> `[..., out]`."""
    weight = dequantize(packed, keras.backend.standardize_dtype(x.dtype))
    return ops.matmul(x, ops.transpose(weight))


def matmul_transposed(dy: Any, packed: Quantized) -> Any:
    """Returns the gradient of `matmul` with respect to `x`, from `dy [..., out]`."""
    return ops.matmul(dy, dequantize(packed, keras.backend.standardize_dtype(dy.dtype)))


def embed(ids: Any, packed: Quantized, dtype: str) -> Any:
    """Looks up rows `ids [...]` of the weight `[V, D]` -> `[..., D]` in `dtype`."""
    return dequantize(packed.map(lambda array: ops.take(array, ids, axis=0)), dtype)
