"""Implementation of the contract on PyTorch.

Decoding compiles one block and calls it for every layer (`jit_part`), so compile time does not grow
with depth. `cpu.py` has the kernels of a compiled block for CPU. Prefill runs without compilation,
because the library is fast for many rows.
"""

import ctypes
import threading
import timeit
import warnings
from collections.abc import Callable
from functools import cache, wraps
from types import ModuleType
from typing import Any

import keras
import ml_dtypes
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo import maybe_mark_dynamic
from torch.utils._pytree import tree_leaves

from keras_gemma.backend import host, reference
from keras_gemma.backend.torch import cpu
from keras_gemma.backend.torch import quantized as torch_quantized
from keras_gemma.backend.torch.quantized import NOT_COMPILED

LOGITS_PER_CHUNK = 1 << 20
"""Logits that a loss processes at a time: 4 MB of float32, which stay in the processor's cache."""

OMP_PAUSE_SOFT = 1
"""Argument of OpenMP's `omp_pause_resource_all` that keeps its settings."""

MIN_COMPILED_BYTES = 2 << 20
"""Minimum bytes of a block to be compiled. Those of Gemma 3 270M, 11 MB in bfloat16, compile in 3
seconds, and then 128 tokens take 2.8 s instead of 6.2. For tiny models, compilation takes longer
than a text."""


def from_numpy(packed: np.ndarray) -> Tensor:
    if packed.dtype.name != "bfloat16":
        return torch.from_numpy(packed)
    return torch.from_numpy(packed.view("int16")).view(torch.bfloat16)


def to_numpy(x: Tensor) -> np.ndarray:
    x = x.detach().cpu()
    if x.dtype != torch.bfloat16:
        return np.array(x)
    # Keras would make two copies in float32.
    return x.view(torch.int16).numpy().copy().view(ml_dtypes.bfloat16)


def _for_inductor(x: Tensor) -> bool:
    """Returns True if Inductor compiles this for a CPU, where its loops beat library calls."""
    # An exported program may also run uncompiled.
    is_compiling = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    return x.device.type == "cpu" and is_compiling


def matmul(x: Tensor, packed: Tensor) -> Tensor:
    if torch.compiler.is_exporting():  # for any number of rows
        return F.linear(x, packed)
    rows = x.numel() // x.shape[-1]
    if rows <= cpu.MAX_ROWS_IN_LOOP and _for_inductor(x):
        y = cpu.few_rows(cpu.materialize(x.reshape(rows, -1)), packed)
    elif rows in cpu.WEIGHT_FIRST and x.device.type == "cpu" and x.dtype == torch.bfloat16:
        y = torch.mm(packed, x.reshape(rows, -1).T).T.contiguous()
    else:
        # As rows: for a non-contiguous `x` PyTorch would make one product per sequence, and write
        # out the transposed weight for this.
        y = F.linear(x.reshape(rows, -1), packed)
    return y.reshape(*x.shape[:-1], packed.shape[0])


def matmul_transposed(y: Tensor, packed: Tensor) -> Tensor:
    return y @ packed


quantized_matmul = torch_quantized.matmul


def quantized_layout() -> ModuleType:
    return torch_quantized


def embed(ids: Tensor, packed: Tensor) -> Tensor:
    return F.embedding(ids, packed)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, scale: float, soft_cap: float | None
) -> Tensor:
    is_trained = any(heads.requires_grad for heads in (query, key, value))
    is_plain = not (is_trained or torch.compiler.is_compiling())
    if soft_cap is None and query.shape[1] > 1 and is_plain:
        return _attend_in_library(query, key, value, mask, scale)
    if not _for_inductor(query) or query.shape[1] > 1:
        return reference.attend(query, key, value, mask, scale=scale, soft_cap=soft_cap)
    return cpu.attend_one_query(query, key, value, mask, scale=scale, soft_cap=soft_cap)


def _attend_in_library(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
) -> Tensor:
    """Same as `reference.attend` without a soft cap.

    It takes 5.2 ms instead of 7.5 for 256 queries and 768 keys of Gemma 3 270M, in bfloat16. Its
    gradient in bfloat16 is less precise than the reference's, so training does not use it.
    """
    heads = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        mask[:, None],
        scale=scale,
        enable_gqa=True,
    )
    # Not all of its kernels give zeros to queries that see nothing.
    return heads.transpose(1, 2).masked_fill(~mask.any(-1)[:, :, None, None], 0.0)


def log_sum_and_max(products: Tensor, soft_cap: float | None) -> tuple[Tensor, Tensor]:
    parts = [reference.log_sum_and_max(rows, soft_cap) for rows in _few_rows(products)]
    sums, largest = (torch.cat(results) for results in zip(*parts, strict=True))
    return sums, largest


def _few_rows(products: Tensor) -> tuple[Tensor, ...]:
    """Splits `products [R, V]` into rows that fit into the processor's cache."""
    on_cpu = products.device.type == "cpu"
    return products.split(
        max(1, LOGITS_PER_CHUNK // products.shape[1]) if on_cpu else len(products)
    )


def cross_entropy(
    products: Tensor, target_ids: Tensor, soft_cap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    rows, targets = products.flatten(0, -2), target_ids.flatten()[:, None].long()
    parts = _few_rows(rows)
    parts = zip(parts, targets.split(len(parts[0])), strict=True)
    results = torch.cat([_cross_entropy(*part, soft_cap) for part in parts])
    losses, hits = results.reshape(*target_ids.shape, 2).unbind(-1)
    return losses, hits, rows.view_as(products)


def _cross_entropy(products: Tensor, targets: Tensor, soft_cap: float | None) -> Tensor:
    """Returns losses and hits `[R, 2]`; overwrites `products [R, V]` with their gradient."""
    logits = products.float()
    if soft_cap is not None:
        logits = logits.div_(soft_cap).tanh_().mul_(soft_cap)
    chosen, largest = logits.gather(-1, targets), logits.amax(-1, keepdim=True)
    change = (logits - largest).exp_()
    total = change.sum(-1, keepdim=True)
    losses = total.log() + largest - chosen
    change.div_(total).scatter_add_(-1, targets, torch.full_like(chosen, -1.0))
    if soft_cap is not None:
        change.mul_(logits.div_(soft_cap).square_().neg_().add_(1.0))
    products.copy_(change)
    return torch.cat([losses, (chosen >= largest).float()], dim=-1)


map = reference.map


def write_cache(cache: Tensor, new: Tensor, slots: Tensor) -> Tensor:
    rows = torch.arange(cache.shape[0], device=cache.device)[:, None]
    return cache.index_put_((rows, slots.long()), new)


def insert_row(array: Tensor, row: Tensor, at: Tensor) -> Tensor:
    return array.index_copy_(0, at.reshape(1).long(), row)


def compile(program: Callable[..., Any], donate: int | None = None) -> Callable[..., Any]:
    return torch.inference_mode()(program)


compile_step = compile

_compile_lock = threading.Lock()
"""Lock for running compiled code, so that two threads do not compile the same code."""


@cache
def _warn_once() -> None:
    warnings.warn(
        "PyTorch could not compile a part of the model. Generation runs without compilation, at "
        "half the speed or less. Compilation needs a C++ compiler: install one, such as g++, or "
        "set the environment variable CXX. Set TORCH_LOGS=dynamo to see the cause.",
        stacklevel=3,
    )


def _let_grow(args: tuple[Any, ...]) -> None:
    """Marks R as dynamic in caches `[B, R, K, H]` and masks `[B, T, R]`, because texts grow."""
    for tensor in tree_leaves(args):
        axis = {3: 2, 4: 1}.get(getattr(tensor, "ndim", None))
        if axis is not None and tensor.shape[axis] > 1:
            maybe_mark_dynamic(tensor, axis)


def jit_part(function: Callable[..., Any]) -> Callable[..., Any]:
    @cache  # created on first use, because the compiler takes seconds to load
    def compiled(has_groups: bool) -> Callable[..., Any]:
        # Beyond the limit, 8 shapes by default, new batch sizes run uncompiled; with
        # `fullgraph=True` they would raise.
        return torch.compile(
            function,
            dynamic=False,
            recompile_limit=64,
            options={
                "guard_filter_fn": torch.compiler.skip_guard_on_globals_unsafe,
                **(torch_quantized.ONE_LOOP if has_groups else {}),
            },
        )

    works = True

    @wraps(function)
    def run(x: Tensor, weights: dict[str, Tensor], *args: Any) -> Any:
        nonlocal works
        arrays = [array for array in tree_leaves(weights) if array is not None]
        if works and sum(array.nbytes for array in arrays) >= MIN_COMPILED_BYTES:
            _let_grow(args)
            has_groups = any(array.ndim == 4 for array in arrays)
            try:
                with _compile_lock:
                    return compiled(has_groups)(x, weights, *args)
            except NOT_COMPILED:
                works = False
                _warn_once()
        return function(x, weights, *args)

    return run


def while_loop(
    cond: Callable[[Any], Any], step: Callable[[Any, Any], Any]
) -> Callable[[Any, Any, int], Any]:
    return torch.inference_mode()(reference.while_loop(cond, step))


def requires_grad(x: Tensor) -> Tensor:
    return x.detach().requires_grad_() if torch.is_grad_enabled() else x


def free_memory() -> int | None:
    if not torch.cuda.is_available():
        return host.free_memory()
    reserved = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return torch.cuda.mem_get_info()[0] + reserved


def peak_device_memory() -> int | None:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def release_threads() -> None:
    # Parallel loops of GNU OpenMP put their threads to sleep after each loop if there are more of
    # them than cores, and each calling thread has threads of its own.
    pause = getattr(ctypes.CDLL(torch._C.__file__), "omp_pause_resource_all", None)
    if pause is not None:
        pause(OMP_PAUSE_SOFT)


def memory_bandwidth() -> float:
    array = torch.ones(1 << 28, dtype=torch.float32, device=keras.ops.zeros(()).device)
    return array.nbytes / min(timeit.repeat(lambda: array.sum().item(), repeat=6, number=1))
