"""Kernels of the contract for JAX on CPU.

XLA on CPU has two fast bfloat16 products and many slow ones:

- One row times a matrix is one parallel loop over the stored weight, but only in this form: weight
  `[out, in]`, `in` at most a few thousand (`packing.py`), no wider accumulator, and outside of a
  `while` loop. Inside a `while` loop, the same product is four times slower. Decoding on CPU
  therefore steps from Python.
- More rows use a library (YNNPACK) that reads bfloat16 and sums in float32, but only if float32
  results are requested. Otherwise XLA first writes the whole weight out in float32.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from keras_gemma.backend import packing, reference
from keras_gemma.backend.quantized import Quantized
from keras_gemma.backend.xla_cpu import one_query, xla_quantized

HAS_SCHEDULERS = jax.__version_info__ >= (0, 10)
"""True if XLA has the compiler option; with an earlier one, programs need more memory."""

LEAST_MEMORY = (
    {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"} if HAS_SCHEDULERS else {}
)
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


def _one_row(x: Array, packed: Array) -> Array:
    """Multiplies `x [1, in]` -> `[1, out]`."""
    if packed.ndim == 2:
        return x @ packed.T
    blocks, _, length = packed.shape
    parts = x.reshape(1, blocks, length)
    return sum(parts[:, i] @ packed[i].T for i in range(blocks))


def product(equation: str, a: Array, b: Array) -> Array:
    """Same as `jnp.einsum`, in float32."""
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _rows(x: Array, packed: Array) -> Array:
    """Multiplies at least two rows, `x [rows, in]` -> `[rows, out]`, with the library."""
    few = _few(x.shape[0])
    if packed.ndim == 3:
        blocks, _, length = packed.shape
        x = x.reshape(-1, blocks, length)
        if few:
            y = product("boi,rbi->bor", packed, x).sum(0)
        else:
            y = sum(product("ri,oi->ro", x[:, i], packed[i]) for i in range(blocks))
    elif few:
        y = product("oi,ri->or", packed, x)
    else:
        y = product("ri,oi->ro", x, packed)
    # Rounded before it is transposed: XLA would remove a transposition by swapping the operands.
    y = y.astype(x.dtype)
    return y.T if few else y


@jax.custom_vjp
def _rows_with_gradient(x: Array, packed: Array) -> Array:
    """Same as `_rows`, with a gradient that also uses the library.

    JAX's own gradient would multiply in float32, and write the weight out in float32 for this.
    """
    return _rows(x, packed)


def _rows_backward(residuals: tuple[Any, Any], change: Array) -> tuple[Array, Array]:
    x, packed = residuals
    blocks = packed if packed.ndim == 3 else packed[None]
    parts = jnp.split(x, len(blocks), axis=1)
    by_x = [product("ro,oi->ri", change, block) for block in blocks]
    by_weight = [product("ro,ri->oi", change, part) for part in parts]
    by_weight = jnp.stack(by_weight).reshape(packed.shape)
    return jnp.concatenate(by_x, axis=1).astype(x.dtype), by_weight.astype(packed.dtype)


_rows_with_gradient.defvjp(lambda x, packed: (_rows(x, packed), (x, packed)), _rows_backward)


def matmul(x: Array, packed: Array) -> Array:
    """Multiplies bfloat16 rows `x [rows, in]` -> `[rows, out]`."""
    return (_one_row if x.shape[0] == 1 else _rows_with_gradient)(x, packed)


def _ones(lanes: int) -> Array:
    # The barrier hides the ones: XLA would turn the product into a sum, which is not this loop.
    return jax.lax.optimization_barrier(jnp.ones((1, lanes), jnp.float32))


def _one_row_in_8_bits(x: Array, packed: Quantized) -> Array:
    """Multiplies `x [1, in]` -> `[1, out]`: 58 GB/s with 512-bit vectors, 47 with `one_row`."""
    values = packed.values if packed.values.ndim == 3 else packed.values[None]
    parts = x.astype(jnp.float32).reshape(values.shape[0], 1, -1)
    products = [
        part @ block.astype(jnp.float32).T for part, block in zip(parts, values, strict=True)
    ]
    # The barrier prevents fusion with the sum, which would make the loops sequential.
    y = sum(jax.lax.optimization_barrier(products))
    return (y * packed.scales).astype(x.dtype)


def quantized_matmul(x: Array, packed: Quantized) -> Array:
    """Multiplies `x [rows, in]` by a quantized weight -> `[rows, out]`."""
    by_row = not packed.has_groups
    if x.shape[0] == 1 and by_row and packed.values.shape[-1] <= packing.MAX_BLOCK_LENGTH:
        return _one_row_in_8_bits(x, packed)
    if xla_quantized.prefers_row_passes(x.shape[0], packed):
        return xla_quantized.few_rows(x, packed, _ones)
    few = _few(x.shape[0])

    def multiply(x: Array, weight: Array) -> Array:
        return product("oi,ri->or", weight, x) if few else product("ri,oi->ro", x, weight)

    return xla_quantized.many_rows(x, packed, multiply, jax.lax.map, weight_first=few)


def quantized_matmul_transposed(dy: Array, packed: Quantized) -> Array:
    """Multiplies `dy [rows, out]` by the transposed weight -> `[rows, in]`, chunk by chunk."""
    dtype, (rows, out) = dy.dtype, dy.shape
    chunk = xla_quantized.chunk_size(out)
    stored = xla_quantized.chunk_arrays(packed)
    if not packed.has_groups:
        dy = (dy * packed.scales).astype(dtype)

    def by_chunk(array: Array) -> Array:
        return array.reshape(-1, out // chunk, chunk, array.shape[-1]).swapaxes(0, 1)

    def add(totals: list[Array], elements: tuple[Array, ...]) -> tuple[list[Array], None]:
        dy, *arrays = elements
        weight = Quantized.from_file_names(dict(zip(stored, arrays, strict=True)))
        parts = zip(totals, xla_quantized.dequantize(weight, dtype.name), strict=True)
        return [total + product("rs,bsl->brl", dy, part) for total, part in parts], None

    length = packed.values.shape[-1]
    zeros = jnp.zeros((packed.values.size // (out * length), rows, length), jnp.float32)
    dy = dy.reshape(rows, out // chunk, chunk).swapaxes(0, 1)
    totals = [zeros] * (1 if packed.values.dtype == jnp.int8 else 2)
    parts, _ = jax.lax.scan(add, totals, (dy, *map(by_chunk, stored.values())))
    return xla_quantized.join(parts, packed).astype(dtype)


def attend_one_query(*inputs: Array, **options: Any) -> Array:
    """Same as `reference.attend`, for one bfloat16 query per sequence."""

    def multiply(a: Array, b: Array, transpose: bool) -> Array:
        return product("bmi,bri->bmr" if transpose else "bmi,bir->bmr", a, b)

    return one_query.attend(*inputs, **options, product=multiply)


def _attend_many_queries(
    query: Array, key: Array, value: Array, mask: Array, scale: float, soft_cap: float | None
) -> Array:
    b, t, n, h = query.shape
    s, k = key.shape[1:3]
    by_head = query.reshape(b, t, k, n // k, h).transpose(0, 2, 3, 1, 4)  # (B, K, G, T, H)
    keys, values = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    logits = product("bkrh,bksh->bkrs", by_head.reshape(b, k, -1, h), keys) * scale
    logits = logits.reshape(b, k, n // k, t, s)
    if soft_cap is not None:
        logits = jnp.tanh(logits / soft_cap) * soft_cap
    visible = mask[:, None, None]
    weights = jax.nn.softmax(jnp.where(visible, logits, reference.LOWEST), axis=-1)
    weights = jnp.where(visible, weights, 0.0).astype(value.dtype)
    heads = product("bkrs,bksh->bkrh", weights.reshape(b, k, -1, s), values).astype(value.dtype)
    return heads.reshape(b, k, n // k, t, h).transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def attend_many_queries(
    query: Array, key: Array, value: Array, mask: Array, scale: float, soft_cap: float | None
) -> Array:
    """Same as `reference.attend`, for bfloat16: 2.4 ms instead of 6.2 for 256 queries, 768 keys.

    The heads that share a key are the rows of one product, and the products read bfloat16. The
    weights are rounded to it, as in fused kernels. The gradient is the reference's.
    """
    return _attend_many_queries(query, key, value, mask, scale, soft_cap)


def _attend_forward(*args: Any) -> tuple[Array, tuple[Any, ...]]:
    return _attend_many_queries(*args), args[:4]


def _attend_backward(
    scale: float, soft_cap: float | None, residuals: tuple[Any, ...], change: Array
) -> tuple[Any, ...]:
    *inputs, mask = residuals
    options = {"scale": scale, "soft_cap": soft_cap}
    _, gradient = jax.vjp(lambda *heads: reference.attend(*heads, mask, **options), *inputs)
    return *gradient(change), None


attend_many_queries.defvjp(_attend_forward, _attend_backward)


def write_cache(cache: Array, new: Array, slots: Array) -> Array:
    # As integers, because XLA on CPU converts a whole bfloat16 cache to float32 to update it.
    bits = jnp.dtype(f"uint{8 * cache.dtype.itemsize}")
    old, fresh = (jax.lax.bitcast_convert_type(part, bits) for part in (cache, new))
    if slots.shape[1] == 1:  # XLA makes this a loop that writes only the slots
        is_slot = jnp.arange(cache.shape[1])[None] == slots
        written = jnp.where(is_slot[:, :, None, None], fresh, old)
    else:
        written = old.at[jnp.arange(cache.shape[0])[:, None], slots].set(fresh)
    return jax.lax.bitcast_convert_type(written, cache.dtype)
