"""Kernels of the contract for JAX on CPU.

XLA on CPU has two fast bfloat16 products and many slow ones:

- One row times a matrix is one parallel loop over the stored weight, but only in this form: weight
  `[out, in]`, `in` at most a few thousand (`packing.py`), no wider accumulator, and outside of a
  `while` loop. Inside a `while` loop, the same product is four times slower. Decoding on CPU
  therefore steps from Python.
- More rows use a library (YNNPACK) that reads bfloat16 and sums in float32, but only if float32
  results are requested. Otherwise XLA first writes the whole weight out in float32.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from keras_gemma.backend import packing
from keras_gemma.backend.quantized import Quantized
from keras_gemma.backend.xla_cpu import one_query, xla_quantized

LEAST_MEMORY = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
"""Compiler options for programs. For float32 sums, XLA on CPU converts the operands that its
library does not accept. Its default scheduler converts those of all layers in advance."""

WIDE_VECTORS = {"xla_cpu_prefer_vector_width": 512}
"""Compiler options for decode steps. At a bandwidth of 85 GB/s, one row reads 58 GB/s in 8 bits
instead of 39, and 68 in bfloat16 instead of 59. Processors without such vectors ignore them."""

MAX_ROWS_WEIGHT_FIRST = 64
"""Maximum rows for which the library is faster with the weight as its first operand: 36 GB/s
instead of 26 at 4 rows, 13 instead of 6 at 64. From 128 rows, both reach 800 to 1000 GFLOP/s."""


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
    """Multiplies bfloat16 rows `x [rows, in]` -> `[rows, out]`."""
    return (_one_row if x.shape[0] == 1 else _rows_with_gradient)(x, packed)


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


def quantized_matmul(x: jax.Array, packed: Quantized) -> jax.Array:
    """Multiplies `x [rows, in]` by a quantized weight -> `[rows, out]`."""
    in_8_bits = packed.values.dtype == jnp.int8
    if x.shape[0] == 1 and in_8_bits and packed.values.shape[-1] <= packing.MAX_BLOCK_LENGTH:
        return _one_row_in_8_bits(x, packed)
    if xla_quantized.prefers_row_passes(x.shape[0], packed):
        return xla_quantized.few_rows(x, packed, _ones)
    few = _few(x.shape[0])

    def product(x: jax.Array, weight: jax.Array) -> jax.Array:
        return _product("oi,ri->or", weight, x) if few else _product("ri,oi->ro", x, weight)

    def each(function: Callable[..., Any], *arrays: jax.Array) -> jax.Array:
        return jax.lax.map(lambda elements: function(*elements), arrays)

    return xla_quantized.many_rows(x, packed, product, each, weight_first=few)


def quantized_matmul_transposed(dy: jax.Array, packed: Quantized) -> jax.Array:
    """Multiplies `dy [rows, out]` by the transposed weight -> `[rows, in]`."""

    def product(dy: jax.Array, weight: jax.Array) -> jax.Array:
        return _product("rs,bsl->brl", dy, weight)

    def add_up(function: Callable[..., Any], *arrays: jax.Array) -> Any:
        def add(total: Any, elements: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, function(*elements)), None

        shapes = jax.eval_shape(function, *(array[0] for array in arrays))
        zeros = jax.tree.map(lambda array: jnp.zeros(array.shape, array.dtype), shapes)
        return jax.lax.scan(add, zeros, arrays)[0]

    return xla_quantized.matmul_transposed(dy, packed, product, add_up)


def attend_one_query(*inputs: jax.Array, **options: Any) -> jax.Array:
    """Same as `reference.attend`, for one bfloat16 query per sequence."""

    def product(a: jax.Array, b: jax.Array, transpose: bool) -> jax.Array:
        return _product("bmi,bri->bmr" if transpose else "bmi,bir->bmr", a, b)

    return one_query.attend(*inputs, **options, product=product)


def write_cache(cache: jax.Array, new: jax.Array, slots: jax.Array) -> jax.Array:
    # As integers, because XLA on CPU converts a whole bfloat16 cache to float32 to update it.
    bits = jnp.dtype(f"uint{8 * cache.dtype.itemsize}")
    old, fresh = (jax.lax.bitcast_convert_type(part, bits) for part in (cache, new))
    if slots.shape[1] == 1:  # XLA makes this a loop that writes only the slots
        is_slot = jnp.arange(cache.shape[1])[None] == slots
        written = jnp.where(is_slot[:, :, None, None], fresh, old)
    else:
        written = old.at[jnp.arange(cache.shape[0])[:, None], slots].set(fresh)
    return jax.lax.bitcast_convert_type(written, cache.dtype)
