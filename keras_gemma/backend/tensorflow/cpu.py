"""Kernels of the contract for TensorFlow on CPU.

In XLA one row is fastest in the layout of `packing.py`. More rows are fastest as a bfloat16 product
with float32 sums (see `jax/cpu.py`), which only XLA offers in TensorFlow. In a plain graph, oneDNN
multiplies many rows.
"""

from functools import partial
from typing import Any

import tensorflow as tf
from tensorflow import Tensor

from keras_gemma.backend.quantized import Quantized
from keras_gemma.backend.xla_cpu import one_query, xla_quantized


def one_row(x: Tensor, packed: Tensor) -> Tensor:
    """Multiplies `x [1, in]` -> `[1, out]`."""
    if packed.shape.rank == 2:
        return tf.matmul(x, packed, transpose_b=True)
    parts = tf.split(x, packed.shape[0], axis=1)
    return tf.add_n([tf.matmul(part, packed[i], transpose_b=True) for i, part in enumerate(parts)])


def _product(a: Tensor, b: Tensor, transpose: bool) -> Tensor:
    """Multiplies `a [..., M, I]` by `b [..., I, R]` or its transpose, in float32. Only in XLA."""
    return tf.raw_ops.BatchMatMulV3(x=a, y=b, adj_y=transpose, Tout=tf.float32)


def rows_in_xla(x: Tensor, packed: Tensor) -> Tensor:
    """Multiplies at least two rows, `x [rows, in]` -> `[rows, out]`. Works only in XLA."""
    # The weight is the first operand, and the result is rounded before it is transposed. Otherwise
    # XLA swaps the operands and reads 23 GB/s instead of 36 at 4 rows.
    if packed.shape.rank == 2:
        y = _product(packed, x, True)
    else:
        parts = tf.stack(tf.split(x, packed.shape[0], axis=1))
        # `reduce_sum`, fused with a product of this size, aborts the process.
        y = tf.add_n(tf.unstack(_product(packed, parts, True)))
    return tf.transpose(tf.cast(y, x.dtype))


def _few_rows_quantized(x: Tensor, packed: Quantized) -> Tensor:
    return xla_quantized.few_rows(x, packed, lambda lanes: tf.ones((1, lanes)))


_few_rows_compiled = tf.function(_few_rows_quantized, jit_compile=True, autograph=False)


@tf.function(jit_compile=True, autograph=False)
def _dequantized(x: Tensor, packed: Quantized) -> list[Tensor]:
    arrays = xla_quantized.chunk_arrays(packed)
    return xla_quantized.dequantize(Quantized.from_file_names(arrays), x.dtype.name)


def _rows_quantized_in_xla(x: Tensor, packed: Quantized) -> Tensor:
    def product(x: Tensor, weight: Tensor) -> Tensor:
        return _product(weight, x, True)

    each = partial(tf.map_fn, fn_output_signature=tf.float32)
    return xla_quantized.many_rows(x, packed, product, each, weight_first=True)


def _dequantized_blocks(x: Tensor, packed: Quantized) -> list[Tensor]:
    """Dequantizes the weight with XLA -> parts `[blocks, out, length]` in the dtype of `x`."""
    with tf.control_dependencies([x]):  # otherwise all weights are dequantized at the start
        weights = _dequantized(x, packed)
    return [weight if weight.shape.rank == 3 else weight[None] for weight in weights]


def _rows_quantized(x: Tensor, packed: Quantized) -> Tensor:
    """Multiplies `x [rows, in]` -> `[rows, out]` in a plain graph, with oneDNN."""
    weights = _dequantized_blocks(x, packed)
    y = 0.0
    for part, weight in zip(xla_quantized.split(x, packed), weights, strict=True):
        products = tf.matmul(part, weight, transpose_b=True)
        y += tf.reduce_sum(tf.cast(products, tf.float32), axis=0)
    if not packed.has_groups:
        y *= packed.scales
    return tf.cast(y, x.dtype)


def quantized_matmul(x: Tensor, packed: Quantized, in_xla: bool) -> Tensor:
    """Multiplies `x [rows, in]` by a quantized weight -> `[rows, out]`."""
    if xla_quantized.prefers_row_passes(x.shape[0], packed):
        return (_few_rows_quantized if in_xla else _few_rows_compiled)(x, packed)
    return (_rows_quantized_in_xla if in_xla else _rows_quantized)(x, packed)


def quantized_matmul_transposed(dy: Tensor, packed: Quantized) -> Tensor:
    """Multiplies `dy [rows, out]` by the transposed weight -> `[rows, in]`, in a plain graph."""
    if not packed.has_groups:
        dy = tf.cast(tf.cast(dy, tf.float32) * packed.scales, dy.dtype)
    parts = [tf.matmul(dy, weight) for weight in _dequantized_blocks(dy, packed)]
    return xla_quantized.join(parts, packed)


def attend_one_query(*inputs: Tensor, **options: Any) -> Tensor:
    """Same as `reference.attend`, for one bfloat16 query per sequence. Works only in XLA."""
    return one_query.attend(*inputs, **options, product=_product)


def write_one_slot(cache: Tensor, new: Tensor, slots: Tensor) -> Tensor:
    """Same as `reference.write_cache`, for T = 1 in XLA."""
    # As integers, because XLA on CPU converts a bfloat16 cache to float32 to update it.
    bits = tf.as_dtype(f"uint{8 * cache.dtype.size}")
    is_slot = tf.range(tf.shape(cache)[1])[None] == slots
    written = tf.where(is_slot[:, :, None, None], tf.bitcast(new, bits), tf.bitcast(cache, bits))
    return tf.bitcast(written, cache.dtype)
