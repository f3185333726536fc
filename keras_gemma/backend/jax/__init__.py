"""Implementation of the contract on JAX.

XLA on CPU has two fast bfloat16 products and many slow ones:

- One row times a matrix is one parallel loop over the stored weight, but only in this form: weight
  `[out, in]`, `in` at most a few thousand (`packing.py`), no wider accumulator, and outside of a
  `while` loop. Inside a `while` loop, the same product is four times slower. Decoding on CPU
  therefore steps from Python; on an accelerator it is one program.
- More rows use a library (YNNPACK) that reads bfloat16 and sums in float32, but only if float32
  results are requested. Otherwise XLA first writes the whole weight out in float32.
"""

import time
from collections.abc import Callable
from functools import lru_cache, partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from keras import ops

from keras_gemma.backend import (
    host,
    one_query,
    packing,
    quantized,
    reference,
    stepping,
    xla_quantized,
)
from keras_gemma.backend.quantized import Quantized

LEAST_MEMORY = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
"""Compiler options for programs. For float32 sums, XLA on CPU converts the operands that its
library does not accept. Its default scheduler converts those of all layers in advance."""

WIDE_VECTORS = {"xla_cpu_prefer_vector_width": 512}
"""Compiler options for decode steps. At a bandwidth of 85 GB/s, one row reads 58 GB/s in 8 bits
instead of 39, and 68 in bfloat16 instead of 59. Processors without such vectors ignore them."""

MAX_ROWS_WEIGHT_FIRST = 64
"""Maximum rows for which the library is faster with the weight as its first operand: 36 GB/s
instead of 26 at 4 rows, 13 instead of 6 at 64. From 128 rows, both reach 800 to 1000 GFLOP/s."""


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


def _few(rows: Any) -> bool:
    """Returns True if there are few rows; False if their number is symbolic, as in an export."""
    return isinstance(rows, int) and rows <= MAX_ROWS_WEIGHT_FIRST


def _one_row(x: jax.Array, packed: jax.Array) -> jax.Array:
    """Multiplies `x [1, in]` -> `[1, out]`."""
    if packed.ndim == 2:
        return x @ packed.T
    blocks, _, length = packed.shape
    parts = x.reshape(1, blocks, length)
    return sum(parts[:, i] @ packed[i].T for i in range(blocks))


def _product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _rows(x: jax.Array, packed: jax.Array) -> jax.Array:
    """Multiplies at least two rows, `x [rows, in]` -> `[rows, out]`, with the library."""
    few = _few(x.shape[0])
    if packed.ndim == 3:
        blocks, _, length = packed.shape
        x = x.reshape(-1, blocks, length)
        if few:
            y = _product("boi,rbi->bor", packed, x).sum(0)
        else:
            y = sum(_product("ri,oi->ro", x[:, i], packed[i]) for i in range(blocks))
    elif few:
        y = _product("oi,ri->or", packed, x)
    else:
        y = _product("ri,oi->ro", x, packed)
    # Rounded before it is transposed: XLA would remove a transposition by swapping the operands.
    y = y.astype(x.dtype)
    return y.T if few else y


@jax.custom_vjp
def _rows_with_gradient(x: jax.Array, packed: jax.Array) -> jax.Array:
    """Same as `_rows`, with a gradient that also uses the library.

    JAX's own gradient would multiply in float32, and write the weight out in float32 for this.
    """
    return _rows(x, packed)


def _rows_forward(x: jax.Array, packed: jax.Array) -> tuple[jax.Array, tuple[Any, Any]]:
    return _rows(x, packed), (x, packed)


def _rows_backward(residuals: tuple[Any, Any], change: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, packed = residuals
    blocks = packed if packed.ndim == 3 else packed[None]
    parts = jnp.split(x, len(blocks), axis=1)
    by_x = [_product("ro,oi->ri", change, block) for block in blocks]
    by_weight = [_product("ro,ri->oi", change, part) for part in parts]
    by_weight = jnp.stack(by_weight).reshape(packed.shape)
    return jnp.concatenate(by_x, axis=1).astype(x.dtype), by_weight.astype(packed.dtype)


_rows_with_gradient.defvjp(_rows_forward, _rows_backward)


def matmul(x: jax.Array, packed: jax.Array) -> jax.Array:
    rows = x.reshape(-1, x.shape[-1])
    if _on_cpu() and x.dtype == jnp.bfloat16:
        y = (_one_row if rows.shape[0] == 1 else _rows_with_gradient)(rows, packed)
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
    return _product("...o,oi->...i", y, packed).astype(y.dtype)


def quantized_layout() -> ModuleType:
    # On an accelerator XLA fuses dequantization and product.
    return xla_quantized if _on_cpu() else quantized


_compiled_once = partial(jax.jit, inline=True)
"""Decorator for functions with a loop, which JAX otherwise compiles at every eager call. Inlined in
a larger program."""


def _ones(lanes: int) -> jax.Array:
    # The barrier hides the ones: XLA would turn the product into a sum, which is not this loop.
    return jax.lax.optimization_barrier(jnp.ones((1, lanes), jnp.float32))


def _one_row_in_8_bits(x: jax.Array, packed: Quantized) -> jax.Array:
    """Multiplies `x [1, in]` -> `[1, out]`: 58 GB/s with 512-bit vectors, 47 with `one_row`."""
    values = packed.values if packed.values.ndim == 3 else packed.values[None]
    parts = x.astype(jnp.float32).reshape(values.shape[0], 1, -1)
    products = [
        part @ block.astype(jnp.float32).T for part, block in zip(parts, values, strict=True)
    ]
    # The barrier prevents fusion with the sum, which would make the loops sequential.
    y = sum(jax.lax.optimization_barrier(products))
    return (y * packed.scales).astype(x.dtype)


@jax.custom_vjp
@_compiled_once
def quantized_matmul(x: jax.Array, packed: Quantized) -> jax.Array:
    if not _on_cpu():
        return quantized.matmul(x, packed)
    rows = x.reshape(-1, x.shape[-1])
    in_8_bits = packed.values.dtype == jnp.int8
    if rows.shape[0] == 1 and in_8_bits and packed.values.shape[-1] <= packing.MAX_BLOCK_LENGTH:
        y = _one_row_in_8_bits(rows, packed)
    elif xla_quantized.prefers_row_passes(rows.shape[0], packed):
        y = xla_quantized.few_rows(rows, packed, _ones)
    else:
        few = _few(rows.shape[0])

        def product(x: jax.Array, weight: jax.Array) -> jax.Array:
            if few:
                return _product("oi,ri->or", weight, x)
            return _product("ri,oi->ro", x, weight)

        def each(function: Callable[..., Any], *arrays: jax.Array) -> jax.Array:
            return jax.lax.map(lambda elements: function(*elements), arrays)

        y = xla_quantized.many_rows(rows, packed, product, each, weight_first=few)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _keep_packed(x: jax.Array, packed: Quantized) -> tuple[jax.Array, Quantized]:
    return quantized_matmul(x, packed), packed


@_compiled_once
def _quantized_gradient(packed: Quantized, dy: jax.Array) -> tuple[jax.Array, None]:
    """Returns the gradient, which needs only the packed weight. The weight has no gradient."""
    if not _on_cpu():
        return quantized.matmul_transposed(dy, packed), None

    def product(dy: jax.Array, weight: jax.Array) -> jax.Array:
        return _product("rs,bsl->brl", dy, weight)

    def add_up(function: Callable[..., Any], *arrays: jax.Array) -> Any:
        def add(total: Any, elements: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, function(*elements)), None

        shapes = jax.eval_shape(function, *(array[0] for array in arrays))
        zeros = jax.tree.map(lambda array: jnp.zeros(array.shape, array.dtype), shapes)
        return jax.lax.scan(add, zeros, arrays)[0]

    rows = dy.reshape(-1, dy.shape[-1])
    dx = xla_quantized.matmul_transposed(rows, packed, product, add_up)
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
    def product(a: jax.Array, b: jax.Array, transpose: bool) -> jax.Array:
        return _product("bmi,bri->bmr" if transpose else "bmi,bir->bmr", a, b)

    inputs, options = (query, key, value, mask), {"scale": scale, "soft_cap": soft_cap}
    if query.shape[1] == 1 and value.dtype == jnp.bfloat16 and _on_cpu():
        return one_query.attend(*inputs, **options, product=product)
    return reference.attend(*inputs, **options)


cross_entropy = reference.cross_entropy
map = reference.map


def write_cache(cache: jax.Array, new: jax.Array, slots: jax.Array) -> jax.Array:
    if not _on_cpu():
        return cache.at[jnp.arange(cache.shape[0])[:, None], slots].set(new)
    # As integers, because XLA on CPU converts a whole bfloat16 cache to float32 to update it.
    bits = jnp.dtype(f"uint{8 * cache.dtype.itemsize}")
    old, fresh = (jax.lax.bitcast_convert_type(part, bits) for part in (cache, new))
    if slots.shape[1] == 1:  # XLA makes this a loop that writes only the slots
        is_slot = jnp.arange(cache.shape[1])[None] == slots
        written = jnp.where(is_slot[:, :, None, None], fresh, old)
    else:
        written = old.at[jnp.arange(cache.shape[0])[:, None], slots].set(fresh)
    return jax.lax.bitcast_convert_type(written, cache.dtype)


def compile(program: Callable[..., Any], donate: int | None = None) -> Callable[..., Any]:
    options = LEAST_MEMORY if _on_cpu() else {}
    return jax.jit(program, compiler_options=options, donate_argnums=donate)


def jit_part(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def while_loop(
    cond: Callable[[Any], Any], step: Callable[[Any, Any], Any]
) -> Callable[[Any, Any, int], Any]:
    if _on_cpu():
        compiled = jax.jit(step, donate_argnums=1, compiler_options=WIDE_VECTORS)
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
