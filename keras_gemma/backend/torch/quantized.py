"""Int8 and int4 weights on PyTorch.

An int8 weight is stored as `[out, in]`. In int4 each lane of a vector is a row, so memory is read
sequentially and no vector is summed across its lanes:

    values  int32     [out / 16, groups, words, 16]    a word is 8 numbers of a row, first lowest
    scales  bfloat16  [out / 16, groups, 16]           zero points have the same layout

Numbers are stored as 0 to 15; without zero points, 8 represents zero. The highest number of a word
has its top bit inverted, because it is read with its sign and all others without.

In compiled parts, a few rows are products and sums that Inductor turns into one loop. For more
rows, one slice of the weight at a time is dequantized, and the library multiplies. In GB/s of
stored bytes, for one row and a matrix 9216 x 2304 on two cores with a bandwidth of 55 to 75: bf16
70, 8 bits 79, 4 bits 43. Whole decode steps reach the same speeds, 4 bits only with `ONE_LOOP`.
`backend/quantized.py` documents `spec`, `pack`, `unpack` and `embed`.
"""

import math
import threading
import warnings
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed, InternalTorchDynamoError, Unsupported

from keras_gemma.backend import quantized
from keras_gemma.backend.quantized import Quantized
from keras_gemma.backend.torch.cpu import materialize

NOT_COMPILED = (BackendCompilerFailed, InternalTorchDynamoError, Unsupported)
"""Exceptions of a failed compilation. Errors of the compiled function have other types."""

LANES = 16
"""Interleaved rows in 4 bits: one cache line, and one vector of AVX-512."""

MAX_ROWS_IN_LOOP = {8: 8, 4: 4}
"""Maximum rows by bits for which products and sums beat dequantization. Milliseconds in 8 and 4
bits for a matrix 9216 x 2304: 0.7 and 1.0 for 4 rows (bf16 1.3), 1.4 and 2.1 for 8 rows (bf16
1.4)."""

SLICE = {8: 1536, 4: 512}
"""Rows of a weight by bits that are dequantized at a time, 7 or 2 MB of bf16. Memory of that size
is reused. A whole matrix needs new memory each time and takes 7 to 20 ms instead of 2. In 4 bits,
32 rows times a matrix 9216 x 2304 take 5.4 ms, and 6.9 ms with slices of 1536."""

ONE_LOOP = {"realize_acc_reads_threshold": 1000, "realize_opcount_threshold": 1000}
"""Inductor options for int4 weights. By default Inductor splits a sum with so many operands into
two loops and stores the sums of groups: 11 ms instead of 7 for six layers of Gemma 2 2B, 36 instead
of 8 for an embedding of 256,000 rows."""

TOP = -(1 << 31)
"""Bit of a word that is stored inverted."""


def spec(
    shape: tuple[int, int], kind: str, bits: int, group_size: int, zero_points: bool = False
) -> Quantized:
    if bits == 8:
        return quantized.spec(shape, kind, bits, group_size, zero_points)
    if group_size % 8:
        raise ValueError(
            "`group_size` must be a multiple of 8, such as 32, on PyTorch, which stores int4 "
            f"weights in words of 8. Received: group_size={group_size}"
        )
    out, length = shape
    lanes = math.gcd(out, LANES)
    groups = ((out // lanes, length // group_size, lanes), "bfloat16")
    words = (out // lanes, length // group_size, group_size // 8, lanes)
    return Quantized((words, "int32"), groups, groups if zero_points else None)


def pack(plain: Quantized, kind: str, bits: int) -> Quantized:
    if bits == 8:
        return plain
    out = len(plain.values)
    lanes, groups = math.gcd(out, LANES), plain.scales.shape[1]
    pairs = np.ascontiguousarray(plain.values).view("<u2")
    words = ((pairs & 15) | (pairs >> 4 & 240)).astype("uint8").view("<u4")
    words ^= np.uint32(0x08888888 if plain.zero_points is None else 0x80000000)
    words = words.view("int32").reshape(out // lanes, lanes, groups, -1)

    scales, zero_points = (
        None if a is None else np.ascontiguousarray(a.reshape(-1, lanes, groups).swapaxes(1, 2))
        for a in plain[1:]
    )
    return Quantized(np.ascontiguousarray(words.transpose(0, 2, 3, 1)), scales, zero_points)


def unpack(packed: Quantized, shape: tuple[int, int]) -> Quantized:
    if packed.values.dtype == np.int8:
        return packed
    words = np.ascontiguousarray(packed.values.transpose(0, 3, 1, 2)).view("uint32")
    words ^= np.uint32(0x08888888 if packed.zero_points is None else 0x80000000)
    halves = words.view("uint8").reshape(shape[0], -1, 1)
    values = np.concatenate([halves & 15, halves >> 4], axis=-1).reshape(shape).view("int8")
    if packed.zero_points is None:
        values = (values ^ 8) - 8  # 15 is -1
    scales, zero_points = (
        None if a is None else a.swapaxes(1, 2).reshape(shape[0], -1) for a in packed[1:]
    )
    return Quantized(values, scales, zero_points)


def embed(ids: Tensor, packed: Quantized, dtype: str) -> Tensor:
    if packed.values.dtype == torch.int8:
        return quantized.embed(ids, packed, dtype)
    ids, lanes = ids.long(), packed.values.shape[-1]
    block, lane = ids // lanes, ids % lanes
    words = packed.values.permute(0, 3, 1, 2)[block, lane]  # [..., groups, words]
    scales, zero_points = (
        8 if array is None else array.transpose(1, 2)[block, lane].float()[..., None, None]
        for array in packed[1:]
    )
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)
    numbers = ((words ^ TOP)[..., None] >> shifts) & 15
    return ((numbers.float() - zero_points) * scales).flatten(-3).to(getattr(torch, dtype))


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


def _few_rows_4(rows: Tensor, values: Tensor, scales: Tensor, zero_points: Tensor | None) -> Tensor:
    """Multiplies `rows [R, in]` by an int4 weight -> float32 `[R, out]`, one loop in Inductor.

    Numbers are masked but not shifted, so each place of a word is 16 times too large; `rows` is
    scaled down accordingly. Four independent sums keep the processor busy.
    """
    blocks, groups, words, lanes = values.shape
    together = math.gcd(words, 4)  # unrolled words: all of a group of 32
    count = groups * words // together
    values = values.view(blocks, count, together, lanes)
    scales, zero_points = (
        None
        if array is None
        else array.float().repeat_interleave(count // groups, dim=1)
        if count > groups
        else array.float()
        for array in (scales, zero_points)
    )
    weights = [
        (values[:, :, i] & (15 << 4 * j if j < 7 else -(1 << 28))).float()
        for i in range(together)
        for j in range(8)
    ]
    places = 16.0 ** -torch.arange(8, dtype=torch.float32, device=rows.device)
    products = []
    for row in rows.view(-1, count, together, 8):
        placed = materialize(row * places).flatten(1)
        highest, total = row[..., 7].sum(-1), row.sum((-1, -2))
        if zero_points is None:
            sums = [materialize(8 * (highest - total))[:, None]]
        else:
            sums = [materialize(8 * highest)[:, None] - zero_points * materialize(total)[:, None]]
        sums += [0.0] * 3
        for i, weight in enumerate(weights):
            sums[i % 4] = sums[i % 4] + weight * placed[:, i, None]
        y = ((sums[0] + sums[1]) + (sums[2] + sums[3])) * scales
        products.append(y.sum(1).view(-1))
    return torch.stack(products)


def _dequantize_blocks(
    values: Tensor, scales: Tensor, zero_points: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Dequantizes blocks of an int4 weight -> `[in, out]`, which keeps lanes adjacent."""
    words = values.permute(1, 2, 0, 3)[:, :, None]
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=values.device).view(8, 1, 1)
    numbers = ((words ^ TOP) >> shifts) & 15
    zero_points = 8 if zero_points is None else zero_points.float().transpose(0, 1)[:, None, None]
    numbers = (numbers.float() - zero_points) * scales.float().transpose(0, 1)[:, None, None]
    return numbers.to(dtype).flatten(3).flatten(0, 2)


_compile_lock = threading.Lock()
"""Lock for running `_compiled_dequantize_blocks`, because its first call compiles."""


@cache
def _compiled_dequantize_blocks() -> Any:
    return torch.compile(_dequantize_blocks, dynamic=True)


_can_compile = True


def _dequantize_fast(values: Any, scales: Any, zero_points: Any, dtype: torch.dtype) -> Tensor:
    """Same as `_dequantize_blocks`, compiled if possible: 2 ms for a matrix instead of 10 to 40."""
    global _can_compile
    worth = values.device.type == "cpu" and values.nbytes >= 1 << 18
    if _can_compile and worth and not torch.compiler.is_exporting():
        try:
            with _compile_lock:
                return _compiled_dequantize_blocks()(values, scales, zero_points, dtype)
        except NOT_COMPILED:
            _can_compile = False
            warnings.warn(
                "PyTorch could not compile the dequantization of int4 weights, so prefill is at "
                "least five times slower. Compilation needs a C++ compiler: install one, such as "
                "g++, or set the environment variable CXX. Set TORCH_LOGS=dynamo to see the cause.",
                stacklevel=2,
            )
    return _dequantize_blocks(values, scales, zero_points, dtype)


def _dequantize_slice(
    start: int, values: Any, scales: Any, zero_points: Any, dtype: torch.dtype
) -> Tensor:
    """Dequantizes `SLICE` rows of an int4 weight from block `start` on -> `[in, rows]`."""
    part = slice(start, start + SLICE[4] // values.shape[-1])
    zero_points = None if zero_points is None else zero_points[part]
    return _dequantize_fast(values[part], scales[part], zero_points, dtype)


def _many_rows(x: Tensor, values: Tensor, scales: Tensor, zero_points: Tensor | None) -> Tensor:
    """Multiplies `x [R, in]` -> `[R, out]`, one slice of the weight at a time.

    Only the result of int8 weights is scaled, because int8 values are exact in bfloat16.
    """
    products = []
    if values.dtype == torch.int8:
        for weight in values.split(SLICE[8]):
            products.append(torch.mm(weight.to(x.dtype), x.T))
        return (torch.cat(products).T * scales).to(x.dtype).contiguous()
    for start in range(0, len(values), SLICE[4] // values.shape[-1]):
        products.append(torch.mm(x, _dequantize_slice(start, values, scales, zero_points, x.dtype)))
    return torch.cat(products, 1)


# One operation, because an embedding would add hundreds to a graph.
_opaque_many_rows = torch.library.custom_op(
    "keras_gemma::quantized_matmul", _many_rows, mutates_args=()
)


@_opaque_many_rows.register_fake
def _(x: Any, values: Any, scales: Any, zero_points: Any) -> Tensor:
    return x.new_empty(len(x), scales.numel() if scales.ndim == 1 else _out(values))


@torch.library.custom_op("keras_gemma::quantized_matmul_transposed", mutates_args=())
def _matmul_transposed(
    dy: Tensor, values: Tensor, scales: Tensor, zero_points: Tensor | None
) -> Tensor:
    """Multiplies `dy [R, out]` by the transposed weight -> `[R, in]`, the gradient of `matmul`."""
    dtype = dy.dtype
    total: Any = 0
    if values.dtype == torch.int8:
        dy = (dy * scales).to(dtype)
        for part, weight in zip(dy.split(SLICE[8], 1), values.split(SLICE[8]), strict=True):
            total = total + torch.mm(part, weight.to(dtype)).float()
    else:
        starts = range(0, len(values), SLICE[4] // values.shape[-1])
        for start, part in zip(starts, dy.split(SLICE[4], 1), strict=True):
            weight = _dequantize_slice(start, values, scales, zero_points, dtype)
            total = total + torch.mm(part, weight.T).float()
    return total.to(dtype)


@_matmul_transposed.register_fake
def _(dy: Any, values: Any, scales: Any, zero_points: Any) -> Tensor:
    in_8_bits = values.dtype == torch.int8
    return dy.new_empty(len(dy), values.shape[1] if in_8_bits else 8 * math.prod(values.shape[1:3]))


def _keep_packed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Saves only the packed weight, which has no gradient itself."""
    ctx.save_for_backward(*inputs[1:])


def _gradient(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
    return _matmul_transposed(dy.contiguous(), *ctx.saved_tensors), None, None, None


_opaque_many_rows.register_autograd(_gradient, setup_context=_keep_packed)


def _out(values: Tensor) -> int:
    return values.shape[0] * values.shape[-1]


def matmul(x: Tensor, packed: Quantized) -> Tensor:
    """Multiplies `x [..., in]` by the weight -> `[..., out]`."""
    values, scales, zero_points = packed
    bits = 8 if values.dtype == torch.int8 else 4
    out = len(values) if bits == 8 else _out(values)
    rows = x.reshape(-1, x.shape[-1])
    # An exported program may run without Inductor and without this package's operations.
    compiling = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    if x.requires_grad and torch.is_grad_enabled():
        y = _opaque_many_rows(rows, values, scales, zero_points)
    elif compiling and len(rows) <= MAX_ROWS_IN_LOOP[bits]:
        floats = materialize(rows.float())
        if bits == 8:
            y = _few_rows_8(floats, values, scales)
        else:
            y = _few_rows_4(floats, values, scales, zero_points)
        y = y.to(x.dtype)
    elif x.device.type != "cpu":
        if bits == 8:
            weight = (values.float() * scales[:, None]).to(x.dtype)
        else:
            weight = _dequantize_blocks(values, scales, zero_points, x.dtype).T
        y = F.linear(rows, weight)
    else:
        y = (_opaque_many_rows if compiling else _many_rows)(rows, values, scales, zero_points)
    return y.reshape(*x.shape[:-1], out)
