"""The contract on PyTorch.

Decoding compiles one block and calls it for every layer (`fuse`), so compile time does not grow
with depth. Inside of it, one row times a matrix is written as a product and a sum: Inductor makes
that one parallel loop over the weight, at twice the speed of the library's product on CPU.
Prompts run without compilation: many rows are the library's strength.
"""

import time
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from keras_gemma.backend import stepping
from keras_gemma.backend.reference import attend

__all__ = ["attend"]


def packed_shape(shape: tuple[int, ...], kind: str) -> tuple[int, ...]:
    return shape


def pack(weight: np.ndarray, kind: str) -> np.ndarray:
    return weight


def unpack(packed: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return packed


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
    rows = torch.arange(cache.shape[0], device=cache.device)
    return cache.index_put_((rows, slots.long()), new[:, 0])


def compile(program: Callable[..., Any], donate: Sequence[str] = ()) -> Callable[..., Any]:
    @wraps(program)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode():
            return program(*args, **kwargs)

    return run


def fuse(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, dynamic=False)


def loop(
    proceed: Callable[[Any], Any], step: Callable[[Any, Any], Any]
) -> Callable[[Any, Any, int], Any]:
    def run(weights: Any, state: Any, limit: int) -> Any:
        with torch.inference_mode():
            return stepping.run(proceed, step, weights, state, limit)

    return run


def memory_bandwidth() -> float:
    array = torch.ones(1 << 28, dtype=torch.float32)
    fastest = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        array.sum().item()
        fastest = min(fastest, time.perf_counter() - start)
    return array.nbytes / fastest
