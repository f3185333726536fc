"""Int8 and int4 weights on PyTorch.

An int8 weight with one scale per row is stored as `[out, in]`. With groups, each lane of a vector
is a row, so memory is read sequentially and no vector is summed across its lanes:

    values  int32  [out / 16, groups, words, 16]    4 bits: a word is 8 numbers, the first lowest
            int8   [out / 16, groups, numbers, 16]  8 bits
    scales         [out / 16, groups, 16]           also zero points and minimums

4-bit numbers are stored as 0 to 15; 8 represents zero if they are signed. The highest number of a
word has its top bit inverted, because it is read with its sign and all others without.

In compiled parts, a few rows are products and sums that Inductor turns into one loop. For more
rows, one slice of the weight at a time is dequantized, and the library multiplies. In GB/s of
stored bytes, for one row and a matrix 9216 x 2304 on two cores with a bandwidth of 55 to 75: bf16
70, 8 bits 79, 4 bits 43. Whole decode steps reach the same speeds, 4 bits only with `ONE_LOOP`.
`backend/quantized.py` documents `spec`, `pack`, `unpack` and `embed`.
"""

import math
import threading
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed, InternalTorchDynamoError, Unsupported

from keras_gemma.backend import quantized
from keras_gemma.backend.quantized import Layout, Quantized
from keras_gemma.backend.torch.cpu import materialize

# Inductor warns when a loop reads both: here float16 scales and bfloat16 activations.
warnings.filterwarnings("ignore", "bf16 and fp16 are mixed", UserWarning)

NOT_COMPILED = (BackendCompilerFailed, InternalTorchDynamoError, Unsupported)
"""Exceptions of a failed compilation. Errors of the compiled function have other types."""

LANES = 16
"""Interleaved rows of a weight with groups: in 4 bits one cache line and vector of AVX-512."""

MAX_ROWS_IN_LOOP, MAX_ROWS_IN_LOOP_OF_GROUPS = 8, 4
"""Maximum rows for which products and sums beat dequantization. Milliseconds in int8 and int4 for a
matrix 9216 x 2304: 0.7 and 1.0 for 4 rows (bf16 1.3), 1.4 and 2.1 for 8 rows (bf16 1.4)."""

SLICE, SLICE_OF_GROUPS = 1536, 512
"""Rows of a weight that are dequantized at a time, 7 or 2 MB of bf16. Memory of that size is
reused. A whole matrix needs new memory each time and takes 7 to 20 ms instead of 2. In int4, 32
rows times a matrix 9216 x 2304 take 5.4 ms, and 6.9 ms with slices of 1536."""

ONE_LOOP = {"realize_acc_reads_threshold": 1000, "realize_opcount_threshold": 1000}
"""Inductor options for weights with groups. By default Inductor splits a sum with so many operands
into two loops and stores the sums of groups. In int4 that takes 11 ms instead of 7 for six layers
of Gemma 2 2B, and 36 instead of 8 for an embedding of 256,000 rows."""

TOP = -(1 << 31)
"""Bit of a word that is stored inverted."""


def spec(shape: tuple[int, int], kind: str, layout: Layout) -> Quantized:
    group_size = layout.group_size
    if group_size is None:
        return quantized.spec(shape, kind, layout)
    if group_size % 8:
        raise ValueError(
            "`group_size` must be a multiple of 8, such as 32, on PyTorch, which stores weights "
            f"in words of 8 numbers. Received: group_size={group_size}"
        )
    out, length = shape
    lanes = math.gcd(out, LANES)
    groups = (out // lanes, length // group_size)
    if layout.bits == 8:
        values = ((*groups, group_size, lanes), "int8")
    else:
        values = ((*groups, group_size // 8, lanes), "int32")
    return layout.with_groups(values, (*groups, lanes))


def pack(plain: Quantized, kind: str, bits: int) -> Quantized:
    if not plain.has_groups:
        return plain
    out = len(plain.values)
    lanes, groups = math.gcd(out, LANES), plain.scales.shape[1]
    numbers = np.ascontiguousarray(plain.values)
    if bits == 4:
        pairs = numbers.view("<u2")
        words = ((pairs & 15) | (pairs >> 4 & 240)).astype("uint8").view("<u4")
        words ^= np.uint32(0x08888888 if plain.is_signed else 0x80000000)
        numbers = words.view("int32")
    numbers = numbers.reshape(out // lanes, lanes, groups, -1).transpose(0, 2, 3, 1)

    def by_lanes(array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(array.reshape(-1, lanes, groups).swapaxes(1, 2))

    return Quantized(numbers, *plain[1:]).map(
        lambda array: np.ascontiguousarray(array) if array is numbers else by_lanes(array)
    )


def unpack(packed: Quantized, shape: tuple[int, int]) -> Quantized:
    if not packed.has_groups:
        return packed
    values = np.ascontiguousarray(packed.values.transpose(0, 3, 1, 2))
    if values.dtype == np.int8:
        values = values.reshape(shape)
    else:
        words = values.view("uint32") ^ np.uint32(0x08888888 if packed.is_signed else 0x80000000)
        halves = words.view("uint8").reshape(shape[0], -1, 1)
        values = np.concatenate([halves & 15, halves >> 4], axis=-1).reshape(shape).view("int8")
        if packed.is_signed:
            values = (values ^ 8) - 8  # 15 is -1
    of_groups = packed._replace(values=None).map(lambda a: a.swapaxes(1, 2).reshape(shape[0], -1))
    return of_groups._replace(values=values)


def _numbers(values: Tensor, axes_after: int) -> Tensor:
    """Returns the numbers of groups in float32; in 4 bits 0 to 15.

    `values` has an axis of length 1, with `axes_after` axes after it, for the numbers of a word.
    """
    if values.dtype == torch.int8:
        return values.float()
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=values.device)
    return (((values ^ TOP) >> shifts.view(8, *[1] * axes_after)) & 15).float()


def embed(ids: Tensor, packed: Quantized, dtype: str) -> Tensor:
    if not packed.has_groups:
        return quantized.embed(ids, packed, dtype)
    ids, lanes = ids.long(), packed.values.shape[-1]
    block, lane = ids // lanes, ids % lanes
    values = packed.values.permute(0, 3, 1, 2)[block, lane]  # [..., groups, words]
    arrays = (
        None if array is None else array.transpose(1, 2)[block, lane].float()[..., None, None]
        for array in packed[1:]
    )
    numbers = _scale(_numbers(values[..., None], 0), values.dtype, *arrays)
    return numbers.flatten(-3).to(getattr(torch, dtype))


def _scale(
    numbers: Tensor,
    dtype: torch.dtype,
    scales: Tensor,
    zero_points: Tensor | None,
    minimums: Tensor | None,
) -> Tensor:
    """Returns float32 weights from the numbers of groups, stored as `dtype`."""
    if zero_points is not None:
        numbers = numbers - zero_points
    elif minimums is None and dtype == torch.int32:
        numbers = numbers - 8
    return numbers * scales if minimums is None else numbers * scales + minimums


def _few_rows_8(rows: Tensor, values: Tensor, scales: Tensor) -> Tensor:
    """Multiplies `rows [R, in]` by an int8 weight -> float32 `[R, out]`, one loop in Inductor.

    The loop reads parts of the weight in parallel and reuses each loaded piece of `rows`: one row
    reaches 79 GB/s with two parts, 61 with one.
    """
    out, length = values.shape
    parts = math.gcd(out, 4 if len(rows) > 1 else 2)
    # Inductor's longer sums are more precise than float32 needs and four times slower.
    blocks = next((n for n in range(1, 17) if length <= 4096 * n and length % (64 * n) == 0), 1)
    weights = values.view(parts, out // parts, blocks, length // blocks)
    products = [
        torch.cat([(weight.float() * row).sum(-1).sum(-1) for weight in weights])
        for row in rows.view(-1, blocks, length // blocks)
    ]
    return torch.stack(products) * scales


def _few_rows_of_groups(
    rows: Tensor,
    values: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    minimums: Tensor | None,
) -> Tensor:
    """Multiplies `rows [R, in]` by a weight with groups -> float32 `[R, out]`, one Inductor loop.

    4-bit numbers are masked but not shifted, so each place of a word is 16 times too large; `rows`
    is scaled down accordingly. Four independent sums keep the processor busy.
    """
    blocks, groups, words, lanes = values.shape
    in_4_bits = values.dtype == torch.int32
    together = math.gcd(words, 4 if in_4_bits else 32)  # unrolled: all of a group of 32
    count = groups * words // together
    values = values.view(blocks, count, together, lanes)
    scales, zero_points, minimums = (
        None
        if array is None
        else array.float().repeat_interleave(count // groups, dim=1)
        if count > groups
        else array.float()
        for array in (scales, zero_points, minimums)
    )
    places: Any = 1.0
    if in_4_bits:
        weights = [
            (values[:, :, i] & (15 << 4 * j if j < 7 else -(1 << 28))).float()
            for i in range(together)
            for j in range(8)
        ]
        places = 16.0 ** -torch.arange(8, dtype=torch.float32, device=rows.device)
    else:
        weights = [values[:, :, i].float() for i in range(together)]
    products = []
    for row in rows.view(-1, count, together, 8 if in_4_bits else 1):
        placed = materialize(row * places).flatten(1)
        total = row.sum((-1, -2))
        # What the inverted top bit takes away.
        start = 8 * row[..., 7].sum(-1) if in_4_bits else None
        if zero_points is not None:
            sums = [-zero_points * materialize(total)[:, None], 0.0, 0.0, 0.0]
        else:
            sums = [0.0] * 4
        if in_4_bits and zero_points is None and minimums is None:
            start = start - 8 * total
        if start is not None:
            sums[0] = sums[0] + materialize(start)[:, None]
        for i, weight in enumerate(weights):
            sums[i % 4] = sums[i % 4] + weight * placed[:, i, None]
        y = ((sums[0] + sums[1]) + (sums[2] + sums[3])) * scales
        if minimums is not None:
            y = y + minimums * materialize(total)[:, None]
        products.append(y.sum(1).view(-1))
    return torch.stack(products)


def _dequantize_blocks(dtype: torch.dtype, values: Tensor, *of_groups: Tensor | None) -> Tensor:
    """Dequantizes blocks of a weight with groups -> `[in, out]`, which keeps lanes adjacent."""
    numbers = _numbers(values.permute(1, 2, 0, 3)[:, :, None], 2)
    arrays = (
        None if array is None else array.float().transpose(0, 1)[:, None, None]
        for array in of_groups
    )
    return _scale(numbers, values.dtype, *arrays).to(dtype).flatten(3).flatten(0, 2)


_compile_lock = threading.Lock()
"""Lock for running `_compiled_dequantize_blocks`, because its first call compiles."""


@cache
def _compiled_dequantize_blocks() -> Any:
    return torch.compile(_dequantize_blocks, dynamic=True)


_can_compile = True


def _dequantize_fast(dtype: torch.dtype, values: Any, *of_groups: Any) -> Tensor:
    """Same as `_dequantize_blocks`, compiled if possible: 2 ms for a matrix instead of 10 to 40."""
    global _can_compile
    worth = values.device.type == "cpu" and values.nbytes >= 1 << 18
    if _can_compile and worth and not torch.compiler.is_exporting():
        try:
            with _compile_lock:
                return _compiled_dequantize_blocks()(dtype, values, *of_groups)
        except NOT_COMPILED:
            _can_compile = False
            warnings.warn(
                "PyTorch could not compile the dequantization of int4 weights, so prefill is at "
                "least five times slower. Compilation needs a C++ compiler: install one, such as "
                "g++, or set the environment variable CXX. Set TORCH_LOGS=dynamo to see the cause.",
                stacklevel=2,
            )
    return _dequantize_blocks(dtype, values, *of_groups)


def _slices(dtype: torch.dtype, values: Any, *of_groups: Any) -> Iterator[Tensor]:
    """Yields a weight with groups, dequantized `SLICE_OF_GROUPS` rows at a time -> `[in, rows]`."""
    step = SLICE_OF_GROUPS // values.shape[-1]
    for start in range(0, len(values), step):
        arrays = (None if a is None else a[start : start + step] for a in (values, *of_groups))
        yield _dequantize_fast(dtype, *arrays)


def _many_rows(
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    minimums: Tensor | None,
) -> Tensor:
    """Multiplies `x [R, in]` -> `[R, out]`, one slice of the weight at a time.

    Without groups, only the result is scaled, because int8 values are exact in bfloat16.
    """
    if scales.ndim == 1:
        products = [torch.mm(weight.to(x.dtype), x.T) for weight in values.split(SLICE)]
        return (torch.cat(products).T * scales).to(x.dtype).contiguous()
    slices = _slices(x.dtype, values, scales, zero_points, minimums)
    return torch.cat([torch.mm(x, weight) for weight in slices], 1)


# One operation, because an embedding would add hundreds to a graph.
_opaque_many_rows = torch.library.custom_op(
    "keras_gemma::quantized_matmul", _many_rows, mutates_args=()
)


@_opaque_many_rows.register_fake
def _(x: Any, values: Any, scales: Any, zero_points: Any, minimums: Any) -> Tensor:
    return x.new_empty(len(x), _out(values))


@torch.library.custom_op("keras_gemma::quantized_matmul_transposed", mutates_args=())
def _matmul_transposed(
    dy: Tensor,
    values: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    minimums: Tensor | None,
) -> Tensor:
    """Multiplies `dy [R, out]` by the transposed weight -> `[R, in]`, the gradient of `matmul`."""
    dtype = dy.dtype
    total: Any = 0
    if scales.ndim == 1:
        dy = (dy * scales).to(dtype)
        for part, weight in zip(dy.split(SLICE, 1), values.split(SLICE), strict=True):
            total = total + torch.mm(part, weight.to(dtype)).float()
    else:
        slices = _slices(dtype, values, scales, zero_points, minimums)
        for part, weight in zip(dy.split(SLICE_OF_GROUPS, 1), slices, strict=True):
            total = total + torch.mm(part, weight.T).float()
    return total.to(dtype)


@_matmul_transposed.register_fake
def _(dy: Any, values: Any, scales: Any, zero_points: Any, minimums: Any) -> Tensor:
    numbers = values.numel() * (8 if values.dtype == torch.int32 else 1)
    return dy.new_empty(len(dy), numbers // _out(values))


def _keep_packed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Saves only the packed weight, which has no gradient itself."""
    ctx.save_for_backward(*inputs[1:])


def _gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return _matmul_transposed(dy.contiguous(), *ctx.saved_tensors), None, None, None, None


_opaque_many_rows.register_autograd(_gradient, setup_context=_keep_packed)


def _out(values: Tensor) -> int:
    return len(values) if values.ndim == 2 else values.shape[0] * values.shape[-1]


def matmul(x: Tensor, packed: Quantized) -> Tensor:
    """Multiplies `x [..., in]` by the weight -> `[..., out]`."""
    has_groups = packed.has_groups
    rows = x.reshape(-1, x.shape[-1])
    # An exported program may run without Inductor and without this package's operations.
    compiling = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    if x.requires_grad and torch.is_grad_enabled():
        y = _opaque_many_rows(rows, *packed)
    elif compiling and len(rows) <= (
        MAX_ROWS_IN_LOOP_OF_GROUPS if has_groups else MAX_ROWS_IN_LOOP
    ):
        floats = materialize(rows.float())
        if has_groups:
            y = _few_rows_of_groups(floats, *packed)
        else:
            y = _few_rows_8(floats, packed.values, packed.scales)
        y = y.to(x.dtype)
    elif x.device.type != "cpu":
        if has_groups:
            weight = _dequantize_blocks(x.dtype, *packed).T
        else:
            weight = (packed.values.float() * packed.scales[:, None]).to(x.dtype)
        y = F.linear(rows, weight)
    else:
        y = (_opaque_many_rows if compiling else _many_rows)(rows, *packed)
    return y.reshape(*x.shape[:-1], _out(packed.values))
