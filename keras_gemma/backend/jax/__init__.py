"""Implementation of the contract on JAX. `cpu.py` has the kernels for XLA on CPU."""

import time
from collections.abc import Callable
from functools import lru_cache, partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from keras import ops

from keras_gemma.backend import host, packing, quantized, reference, stepping
from keras_gemma.backend.jax import cpu
from keras_gemma.backend.quantized import Quantized
from keras_gemma.backend.xla_cpu import xla_quantized


def _keep_programs() -> None:
    """Enables a persistent cache of compiled programs, unless the user configured one."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(host.program_cache("jax")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


_keep_programs()


@lru_cache
def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def packed_shape(shape: tuple[int, ...], kind: str) -> tuple[int, ...]:
    return packing.packed_shape(shape, kind) if _on_cpu() else shape


def pack(weight: np.ndarray, kind: str, dtype: Any = None) -> np.ndarray:
    return (packing.pack if _on_cpu() else packing.pack_rows)(weight, kind, dtype)


unpack = packing.unpack
to_numpy = ops.convert_to_numpy


def from_numpy(packed: np.ndarray) -> jax.Array:
    return jax.device_put(packed)  # unlike `asarray`, without a copy


def matmul(x: jax.Array, packed: jax.Array) -> jax.Array:
    rows = x.reshape(-1, x.shape[-1])
    if _on_cpu() and x.dtype == jnp.bfloat16:
        y = cpu.matmul(rows, packed)
    elif packed.ndim == 2:
        y = rows @ packed.T
    else:
        blocks, _, length = packed.shape
        y = jnp.einsum(
            "rbi,boi->ro",
            rows.reshape(-1, blocks, length),
            packed,
            preferred_element_type=jnp.float32,
        ).astype(x.dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def matmul_transposed(y: jax.Array, packed: jax.Array) -> jax.Array:
    x = jnp.einsum("...o,oi->...i", y, packed, preferred_element_type=jnp.float32)
    return x.astype(y.dtype)


def quantized_layout() -> ModuleType:
    # On an accelerator XLA fuses dequantization and product.
    return xla_quantized if _on_cpu() else quantized


_compiled_once = partial(jax.jit, inline=True)
"""Decorator for functions with a loop, which JAX otherwise compiles at every eager call. Inlined in
a larger program."""


@jax.custom_vjp
@_compiled_once
def quantized_matmul(x: jax.Array, packed: Quantized) -> jax.Array:
    if not _on_cpu():
        return quantized.matmul(x, packed)
    y = cpu.quantized_matmul(x.reshape(-1, x.shape[-1]), packed)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _keep_packed(x: jax.Array, packed: Quantized) -> tuple[jax.Array, Quantized]:
    return quantized_matmul(x, packed), packed


@_compiled_once
def _quantized_gradient(packed: Quantized, dy: jax.Array) -> tuple[jax.Array, None]:
    """Returns the gradient, which needs only the packed weight. The weight has no gradient."""
    if not _on_cpu():
        return quantized.matmul_transposed(dy, packed), None
    dx = cpu.quantized_matmul_transposed(dy.reshape(-1, dy.shape[-1]), packed)
    return dx.reshape(*dy.shape[:-1], dx.shape[-1]), None


quantized_matmul.defvjp(_keep_packed, _quantized_gradient)


def embed(ids: jax.Array, packed: jax.Array) -> jax.Array:
    return jnp.take(packed, ids, axis=0, mode="clip")


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    *,
    scale: float,
    soft_cap: float | None,
) -> jax.Array:
    inputs, options = (query, key, value, mask), {"scale": scale, "soft_cap": soft_cap}
    if query.shape[1] == 1 and value.dtype == jnp.bfloat16 and _on_cpu():
        return cpu.attend_one_query(*inputs, **options)
    return reference.attend(*inputs, **options)


cross_entropy = reference.cross_entropy
map = reference.map


def write_cache(cache: jax.Array, new: jax.Array, slots: jax.Array) -> jax.Array:
    if _on_cpu():
        return cpu.write_cache(cache, new, slots)
    return cache.at[jnp.arange(cache.shape[0])[:, None], slots].set(new)


def compile(program: Callable[..., Any], donate: int | None = None) -> Callable[..., Any]:
    options = cpu.LEAST_MEMORY if _on_cpu() else {}
    return jax.jit(program, compiler_options=options, donate_argnums=donate)


def jit_part(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def while_loop(
    cond: Callable[[Any], Any], step: Callable[[Any, Any], Any]
) -> Callable[[Any, Any, int], Any]:
    if _on_cpu():
        compiled = jax.jit(step, donate_argnums=1, compiler_options=cpu.WIDE_VECTORS)
        return lambda weights, state, limit: stepping.run(cond, compiled, weights, state, limit)

    def program(weights: Any, state: Any, limit: Any) -> Any:
        def more(carry: Any) -> Any:
            count, state = carry
            return (count < limit) & cond(state)

        def turn(carry: Any) -> Any:
            count, state = carry
            return count + 1, step(weights, state)

        return jax.lax.while_loop(more, turn, (0, state))[1]

    return jax.jit(program, donate_argnums=1)


def requires_grad(x: jax.Array) -> jax.Array:
    return jax.lax.stop_gradient(x)


def free_memory() -> int | None:
    if _on_cpu():
        return host.free_memory()
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats["bytes_in_use"]


def peak_device_memory() -> int | None:
    return None if _on_cpu() else jax.devices()[0].memory_stats()["peak_bytes_in_use"]


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
