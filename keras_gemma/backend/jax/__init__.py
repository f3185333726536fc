"""Implementation of the contract on JAX. `cpu.py` has the kernels for XLA on CPU."""

import timeit
from collections.abc import Callable
from functools import lru_cache, partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from keras import ops

from keras_gemma.backend import host, quantized, reference
from keras_gemma.backend.jax import cpu
from keras_gemma.backend.quantized import Quantized
from keras_gemma.backend.xla_cpu import xla_quantized

if jax.config.jax_compilation_cache_dir is None:  # not configured by the user
    jax.config.update("jax_compilation_cache_dir", str(host.program_cache("jax")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@lru_cache
def on_cpu() -> bool:
    return jax.default_backend() == "cpu"


to_numpy = ops.convert_to_numpy
from_numpy = jax.device_put  # unlike `asarray`, without a copy


def matmul(x: Array, packed: Array) -> Array:
    rows = x.reshape(-1, x.shape[-1])
    if on_cpu() and x.dtype == jnp.bfloat16:
        y = cpu.matmul(rows, packed)
    elif packed.ndim == 2:
        y = rows @ packed.T
    else:
        blocks, _, length = packed.shape
        y = cpu.product("rbi,boi->ro", rows.reshape(-1, blocks, length), packed).astype(x.dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def matmul_transposed(y: Array, packed: Array) -> Array:
    return cpu.product("...o,oi->...i", y, packed).astype(y.dtype)


def quantized_layout() -> ModuleType:
    # On an accelerator XLA fuses dequantization and product.
    return xla_quantized if on_cpu() else quantized


_compiled_once = partial(jax.jit, inline=True)
"""Decorator for functions with a loop, which JAX otherwise compiles at every eager call."""


@jax.custom_vjp
@_compiled_once
def quantized_matmul(x: Array, packed: Quantized) -> Array:
    if not on_cpu():
        return quantized.matmul(x, packed)
    y = cpu.quantized_matmul(x.reshape(-1, x.shape[-1]), packed)
    return y.reshape(*x.shape[:-1], y.shape[-1])


@_compiled_once
def _quantized_gradient(packed: Quantized, dy: Array) -> tuple[Array, None]:
    """Returns the gradient, which needs only the packed weight. The weight has no gradient."""
    if not on_cpu():
        return quantized.matmul_transposed(dy, packed), None
    dx = cpu.quantized_matmul_transposed(dy.reshape(-1, dy.shape[-1]), packed)
    return dx.reshape(*dy.shape[:-1], dx.shape[-1]), None


quantized_matmul.defvjp(
    lambda x, packed: (quantized_matmul(x, packed), packed), _quantized_gradient
)


def embed(ids: Array, packed: Array) -> Array:
    return jnp.take(packed, ids, axis=0, mode="clip")


def attend(
    query: Array, key: Array, value: Array, mask: Array, *, scale: float, soft_cap: float | None
) -> Array:
    inputs, options = (query, key, value, mask), {"scale": scale, "soft_cap": soft_cap}
    if value.dtype == jnp.bfloat16 and on_cpu():
        if query.shape[1] == 1:
            return cpu.attend_one_query(*inputs, **options)
        return cpu.attend_many_queries(*inputs, scale, soft_cap)
    return reference.attend(*inputs, **options)


log_sum_and_max = reference.log_sum_and_max
cross_entropy = reference.cross_entropy
map = reference.map


def write_cache(cache: Array, new: Array, slots: Array) -> Array:
    if on_cpu():
        return cpu.write_cache(cache, new, slots)
    return cache.at[jnp.arange(cache.shape[0])[:, None], slots].set(new)


def insert_row(array: Array, row: Array, at: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(array, row, at, 0)


def compile(program: Callable[..., Any], donate: int | None = None) -> Callable[..., Any]:
    options = cpu.LEAST_MEMORY if on_cpu() else {}
    return jax.jit(program, compiler_options=options, donate_argnums=donate)


def compile_step(step: Callable[..., Any], donate: int | None = None) -> Callable[..., Any]:
    options = cpu.WIDE_VECTORS if on_cpu() else {}
    return jax.jit(step, compiler_options=options, donate_argnums=donate)


def jit_part(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def while_loop(
    cond: Callable[[Any], Any], step: Callable[[Any, Any], Any]
) -> Callable[[Any, Any, int], Any]:
    if on_cpu():
        return reference.while_loop(cond, compile_step(step, donate=1))

    def program(weights: Any, state: Any, limit: Any) -> Any:
        return jax.lax.while_loop(
            lambda carry: (carry[0] < limit) & cond(carry[1]),
            lambda carry: (carry[0] + 1, step(weights, carry[1])),
            (0, state),
        )[1]

    return jax.jit(program, donate_argnums=1)


requires_grad = jax.lax.stop_gradient


def free_memory() -> int | None:
    if on_cpu():
        return host.free_memory()
    stats = jax.devices()[0].memory_stats() or {}
    return stats["bytes_limit"] - stats["bytes_in_use"] if "bytes_limit" in stats else None


def peak_device_memory() -> int | None:
    return None if on_cpu() else jax.devices()[0].memory_stats()["peak_bytes_in_use"]


def release_threads() -> None:
    """Does nothing: XLA has one pool of threads for all callers."""


def memory_bandwidth() -> float:
    array = jnp.ones((1 << 28,), jnp.float32)
    read = jax.jit(jnp.sum)
    seconds = timeit.repeat(lambda: read(array).block_until_ready(), repeat=6, number=1)
    return array.nbytes / min(seconds)
