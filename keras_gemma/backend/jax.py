"""The contract on JAX.

XLA on CPU runs one row times a matrix as one parallel loop over the stored weight, but only in
this form: weight `[out, in]`, `in` a few thousand (`packing.py`), no wider accumulator asked for,
and outside of a `while` (inside, the same product is four times slower). So decoding on CPU
steps from Python; on an accelerator it is one program.
"""

import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from keras_gemma.backend import host, packing, stepping
from keras_gemma.backend.reference import attend

__all__ = ["attend"]

LEAST_MEMORY = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
"""For many rows XLA on CPU widens weights to float32. Left to its default order it widens those of
all layers beforehand: 1.6 GB instead of 0.1 for six layers of Gemma 2 2B's shape."""

FEW_ROWS = 8
"""Up to so many rows, a pass over the weights for each row beats XLA's product of several."""


@lru_cache
def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def packed_shape(shape: tuple[int, ...], kind: str) -> tuple[int, ...]:
    return packing.packed_shape(shape, kind) if _on_cpu() else shape


def pack(weight: np.ndarray, kind: str, dtype: Any = None) -> np.ndarray:
    return (packing.pack if _on_cpu() else packing.pack_rows)(weight, kind, dtype)


unpack = packing.unpack


def adopt(packed: np.ndarray) -> jax.Array:
    return jax.device_put(packed)  # unlike `asarray`, without a copy


def _one_row(x: jax.Array, packed: jax.Array) -> jax.Array:
    """`x [1, in]` -> `[1, out]`."""
    if packed.ndim == 2:
        return x @ packed.T
    blocks, _, length = packed.shape
    parts = x.reshape(1, blocks, length)
    return sum(parts[:, i] @ packed[i].T for i in range(blocks))


def matmul(x: jax.Array, packed: jax.Array) -> jax.Array:
    rows = x.reshape(-1, x.shape[-1])
    count = rows.shape[0]
    if _on_cpu() and count <= FEW_ROWS and x.dtype == jnp.bfloat16:
        y = jnp.concatenate([_one_row(rows[i : i + 1], packed) for i in range(count)])
    elif packed.ndim == 2:
        y = rows @ packed.T
    else:
        blocks, _, length = packed.shape
        y = jnp.einsum(
            "rbi,boi->ro",
            rows.reshape(count, blocks, length),
            packed,
            preferred_element_type=jnp.float32,
        ).astype(x.dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def embed(ids: jax.Array, packed: jax.Array) -> jax.Array:
    return jnp.take(packed, ids, axis=0, mode="clip")


def write_cache(cache: jax.Array, new: jax.Array, slots: jax.Array) -> jax.Array:
    if slots.size == 1:
        return jax.lax.dynamic_update_slice(cache, new, (0, slots[0, 0], 0, 0))
    return cache.at[jnp.arange(cache.shape[0])[:, None], slots].set(new)


def compile(program: Callable[..., Any], donate: int | None = None) -> Callable[..., Any]:
    options = LEAST_MEMORY if _on_cpu() else {}
    return jax.jit(program, compiler_options=options, donate_argnums=donate)


def fuse(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def loop(
    proceed: Callable[[Any], Any], step: Callable[[Any, Any], Any]
) -> Callable[[Any, Any, int], Any]:
    if _on_cpu():
        compiled = jax.jit(step, donate_argnums=1)
        return lambda weights, state, limit: stepping.run(proceed, compiled, weights, state, limit)

    def program(weights: Any, state: Any, limit: Any) -> Any:
        def more(carry: Any) -> Any:
            count, state = carry
            return (count < limit) & proceed(state)

        def turn(carry: Any) -> Any:
            count, state = carry
            return count + 1, step(weights, state)

        return jax.lax.while_loop(more, turn, (0, state))[1]

    return jax.jit(program, donate_argnums=1)


def free_memory() -> int | None:
    if _on_cpu():
        return host.free_memory()
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats["bytes_in_use"]


def memory_bandwidth() -> float:
    array = jnp.ones((1 << 28,), jnp.float32)
    read = jax.jit(jnp.sum)
    read(array).block_until_ready()
    fastest = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        read(array).block_until_ready()
        fastest = min(fastest, time.perf_counter() - start)
    return array.nbytes / fastest
