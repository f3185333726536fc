"""The contract on PyTorch.

Decoding compiles one block and calls it for every layer (`fuse`), so compile time does not grow
with depth. Inside of it, one row times a matrix is written as a product and a sum: Inductor makes
that one parallel loop over the weight, at twice the speed of the library's product on CPU.
Prompts run without compilation: many rows are the library's strength.
"""

import os
import shutil
import time
import warnings
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from keras_gemma.backend import host, packing, stepping
from keras_gemma.backend.reference import attend

__all__ = ["attend"]

WORTH_COMPILING = 16 << 20
"""Bytes of a block from which compiling it pays. Below, 10 to 20 seconds of compiling would buy
back a few milliseconds a token."""


def packed_shape(shape: tuple[int, ...], kind: str) -> tuple[int, ...]:
    return shape


pack = packing.pack_rows


def unpack(packed: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return packed


def adopt(packed: np.ndarray) -> torch.Tensor:
    if packed.dtype.name != "bfloat16":
        return torch.from_numpy(packed)
    return torch.from_numpy(packed.view("int16")).view(torch.bfloat16)


def matmul(x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    one_row = x.numel() == x.shape[-1]
    if one_row and torch.compiler.is_compiling() and x.device.type == "cpu":
        row = x.reshape(1, -1).float()
        y = (packed.float() * row).sum(-1).to(x.dtype)
        return y.reshape(*x.shape[:-1], packed.shape[0])
    return F.linear(x, packed)


def embed(ids: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    return F.embedding(ids, packed)


def write_cache(cache: torch.Tensor, new: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    rows = torch.arange(cache.shape[0], device=cache.device)[:, None]
    return cache.index_put_((rows, slots.long()), new)


def compile(program: Callable[..., Any], donate: int | None = None) -> Callable[..., Any]:
    @wraps(program)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode():
            return program(*args, **kwargs)

    return run


@cache
def _has_compiler(device: str) -> bool:
    """Whether Inductor can compile for `device`; says so once where it cannot."""
    names = [os.environ.get("CXX"), "g++", "clang++", "c++", "cl"]
    if device != "cpu" or any(name and shutil.which(name) for name in names):
        return True
    warnings.warn(
        "PyTorch finds no C++ compiler, so text is generated without compiling, at half the speed "
        "or less. Install one, such as g++, or name it in the environment variable CXX.",
        stacklevel=2,
    )
    return False


def fuse(function: Callable[..., Any]) -> Callable[..., Any]:
    @cache
    def compiled() -> Callable[..., Any]:  # not before it is needed: the compiler loads for seconds
        # Beyond the limit, 8 shapes by default, another batch size or length runs uncompiled;
        # with `fullgraph=True` it would raise.
        return torch.compile(function, dynamic=False, recompile_limit=64)

    @wraps(function)
    def run(x: torch.Tensor, weights: dict[str, torch.Tensor], *args: Any) -> Any:
        size = sum(weight.nbytes for weight in weights.values())
        if size < WORTH_COMPILING or not _has_compiler(x.device.type):
            return function(x, weights, *args)
        return compiled()(x, weights, *args)

    return run


def loop(
    proceed: Callable[[Any], Any], step: Callable[[Any, Any], Any]
) -> Callable[[Any, Any, int], Any]:
    def run(weights: Any, state: Any, limit: int) -> Any:
        with torch.inference_mode():
            return stepping.run(proceed, step, weights, state, limit)

    return run


def free_memory() -> int | None:
    if not torch.cuda.is_available():
        return host.free_memory()
    reserved = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return torch.cuda.mem_get_info()[0] + reserved


def memory_bandwidth() -> float:
    array = torch.ones(1 << 28, dtype=torch.float32)
    fastest = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        array.sum().item()
        fastest = min(fastest, time.perf_counter() - start)
    return array.nbytes / fastest
