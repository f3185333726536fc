"""Implementation of the contract on TensorFlow.

Prefill runs as a plain graph, where oneDNN multiplies many rows. XLA compiles a decode step. In
XLA one row is fastest in the layout of `packing.py`. More rows are fastest as a bfloat16 product
with float32 sums (see `jax/`), which only XLA offers in TensorFlow. AutoGraph is off, because its
search for control flow would take a third of the tracing time.
"""

import time
from collections.abc import Callable
from contextvars import ContextVar
from functools import lru_cache, wraps
from types import ModuleType
from typing import Any

import numpy as np
import tensorflow as tf
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

_in_xla = ContextVar("in_xla", default=False)
"""True while tracing a function that XLA compiles."""


@lru_cache
def _on_cpu() -> bool:
    return not tf.config.list_physical_devices("GPU")


def packed_shape(shape: tuple[int, ...], kind: str) -> tuple[int, ...]:
    return packing.packed_shape(shape, kind) if _on_cpu() else shape


def pack(weight: np.ndarray, kind: str, dtype: Any = None) -> np.ndarray:
    return (packing.pack if _on_cpu() else packing.pack_rows)(weight, kind, dtype)


unpack = packing.unpack
to_numpy = ops.convert_to_numpy


def from_numpy(packed: np.ndarray) -> tf.Tensor:
    if packed.ctypes.data % packing.ALIGNMENT or not packed.flags.writeable or not _on_cpu():
        return tf.convert_to_tensor(packed)
    bits = packed.view(f"uint{8 * packed.itemsize}")  # DLPack does not support NumPy's bfloat16
    return tf.bitcast(tf.experimental.dlpack.from_dlpack(bits.__dlpack__()), packed.dtype.name)


def _one_row(x: tf.Tensor, packed: tf.Tensor) -> tf.Tensor:
    """Multiplies `x [1, in]` -> `[1, out]`."""
    if packed.shape.rank == 2:
        return tf.matmul(x, packed, transpose_b=True)
    parts = tf.split(x, packed.shape[0], axis=1)
    return tf.add_n([tf.matmul(part, packed[i], transpose_b=True) for i, part in enumerate(parts)])


def _product(a: tf.Tensor, b: tf.Tensor, transpose: bool) -> tf.Tensor:
    """Multiplies `[..., M, I] x [..., I, R]` -> float32 `[..., M, R]`. Works only in XLA.

    `transpose` means that `b` is `[..., R, I]`.
    """
    return tf.raw_ops.BatchMatMulV3(x=a, y=b, adj_y=transpose, Tout=tf.float32)


def _rows_in_xla(x: tf.Tensor, packed: tf.Tensor) -> tf.Tensor:
    """Multiplies at least two rows, `x [rows, in]` -> `[rows, out]`."""
    # The weight is the first operand, and the result is rounded before it is transposed. Otherwise
    # XLA swaps the operands and reads 23 GB/s instead of 36 at 4 rows.
    if packed.shape.rank == 2:
        y = _product(packed, x, True)
    else:
        parts = tf.stack(tf.split(x, packed.shape[0], axis=1))
        # `reduce_sum`, fused with a product of this size, aborts the process.
        y = tf.add_n(tf.unstack(_product(packed, parts, True)))
    return tf.transpose(tf.cast(y, x.dtype))


def matmul(x: tf.Tensor, packed: tf.Tensor) -> tf.Tensor:
    packed = tf.convert_to_tensor(packed)
    rows = tf.reshape(x, (-1, x.shape[-1]))
    special = x.dtype == tf.bfloat16 and _on_cpu()
    if special and rows.shape[0] == 1:
        y = _one_row(rows, packed)
    elif special and _in_xla.get():
        y = _rows_in_xla(rows, packed)
    elif packed.shape.rank == 2:
        y = tf.matmul(rows, packed, transpose_b=True)
    else:
        blocks, _, length = packed.shape
        parts = tf.transpose(tf.reshape(rows, (-1, blocks, length)), (1, 0, 2))
        products = tf.matmul(parts, packed, transpose_b=True)
        y = tf.cast(tf.reduce_sum(tf.cast(products, tf.float32), axis=0), x.dtype)
    shape = tf.concat([tf.shape(x)[:-1], tf.shape(y)[-1:]], axis=0)
    y = tf.reshape(y, shape)
    y.set_shape([*x.shape[:-1], packed.shape[-2]])
    return y


def matmul_transposed(y: tf.Tensor, packed: tf.Tensor) -> tf.Tensor:
    rows = tf.matmul(tf.reshape(y, (-1, y.shape[-1])), packed)
    return tf.reshape(rows, tf.concat([tf.shape(y)[:-1], tf.shape(rows)[-1:]], axis=0))


def quantized_layout() -> ModuleType:
    # On an accelerator XLA fuses dequantization and product.
    return xla_quantized if _on_cpu() else quantized


def _ones(lanes: int) -> tf.Tensor:
    return tf.ones((1, lanes))


@lru_cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return tf.function(function, jit_compile=True, autograph=False)


def _few_rows_quantized(x: tf.Tensor, packed: Quantized) -> tf.Tensor:
    return xla_quantized.few_rows(x, packed, _ones)


def _dequantized(x: tf.Tensor, packed: Quantized) -> list[tf.Tensor]:
    return xla_quantized.dequantize(packed, x.dtype.name)


def _rows_quantized_in_xla(x: tf.Tensor, packed: Quantized) -> tf.Tensor:
    def product(x: tf.Tensor, weight: tf.Tensor) -> tf.Tensor:
        return _product(weight, x, True)

    def each(function: Callable[..., Any], *arrays: tf.Tensor) -> tf.Tensor:
        return tf.map_fn(
            lambda elements: function(*elements), arrays, fn_output_signature=tf.float32
        )

    return xla_quantized.many_rows(x, packed, product, each, weight_first=True)


def _rows_quantized(x: tf.Tensor, packed: Quantized) -> tf.Tensor:
    """Multiplies `x [rows, in]` -> `[rows, out]` in a plain graph.

    XLA dequantizes the weight, and oneDNN multiplies.
    """
    with tf.control_dependencies([x]):  # otherwise all weights are dequantized at the start
        weights = _compiled(_dequantized)(x, packed)
    y = 0.0
    for part, weight in zip(xla_quantized.split(x, packed), weights, strict=True):
        weight = weight if weight.shape.rank == 3 else weight[None]
        products = tf.matmul(part, weight, transpose_b=True)
        y += tf.reduce_sum(tf.cast(products, tf.float32), axis=0)
    if packed.values.dtype == tf.int8:
        y *= packed.scales
    return tf.cast(y, x.dtype)


def _quantized_gradient(dy: tf.Tensor, packed: Quantized) -> tf.Tensor:
    """Returns the gradient of `_quantized_product` with respect to `x`, in a plain graph."""
    if not _on_cpu():
        return quantized.matmul_transposed(dy, packed)
    rows = tf.reshape(dy, (-1, dy.shape[-1]))
    if packed.values.dtype == tf.int8:
        rows = tf.cast(tf.cast(rows, tf.float32) * packed.scales, dy.dtype)
    with tf.control_dependencies([dy]):  # as in `_rows_quantized`
        weights = _compiled(_dequantized)(rows, packed)
    weights = [weight if weight.shape.rank == 3 else weight[None] for weight in weights]
    parts = [tf.matmul(rows, weight) for weight in weights]
    dx = xla_quantized.join(parts, packed)
    dx = tf.reshape(dx, tf.concat([tf.shape(dy)[:-1], tf.shape(dx)[-1:]], axis=0))
    dx.set_shape([*dy.shape[:-1], dx.shape[-1]])
    return dx


def quantized_matmul(x: tf.Tensor, packed: Quantized) -> tf.Tensor:
    packed = Quantized(*(None if a is None else tf.convert_to_tensor(a) for a in packed))

    @tf.custom_gradient
    def product(x: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
        # The gradient needs only the packed weight, which has no gradient itself.
        return _quantized_product(x, packed), lambda dy: _quantized_gradient(dy, packed)

    return product(x)


def _quantized_product(x: tf.Tensor, packed: Quantized) -> tf.Tensor:
    if not _on_cpu():
        return quantized.matmul(x, packed)
    rows = tf.reshape(x, (-1, x.shape[-1]))
    if xla_quantized.prefers_row_passes(rows.shape[0], packed):
        y = (_few_rows_quantized if _in_xla.get() else _compiled(_few_rows_quantized))(rows, packed)
    elif _in_xla.get():
        y = _rows_quantized_in_xla(rows, packed)
    else:
        y = _rows_quantized(rows, packed)
    y = tf.reshape(y, tf.concat([tf.shape(x)[:-1], tf.shape(y)[-1:]], axis=0))
    y.set_shape([*x.shape[:-1], packed.values.shape[-2]])
    return y


def embed(ids: tf.Tensor, packed: tf.Tensor) -> tf.Tensor:
    # A tensor, because TensorFlow copies the whole of a variable before a lookup.
    return tf.gather(tf.convert_to_tensor(packed), ids)


def attend(
    query: tf.Tensor,
    key: tf.Tensor,
    value: tf.Tensor,
    mask: tf.Tensor,
    *,
    scale: float,
    soft_cap: float | None,
) -> tf.Tensor:
    inputs, options = (query, key, value, mask), {"scale": scale, "soft_cap": soft_cap}
    if query.shape[1] == 1 and value.dtype == tf.bfloat16 and _in_xla.get() and _on_cpu():
        return one_query.attend(*inputs, **options, product=_product)
    return reference.attend(*inputs, **options)


def cross_entropy(
    products: tf.Tensor, target_ids: tf.Tensor, soft_cap: float | None
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    # XLA fuses this into a few loops; a plain graph allocates ten arrays of this size.
    return _compiled(reference.cross_entropy)(products, target_ids, soft_cap)


def map(function: Callable[..., Any], arrays: Any) -> Any:
    # One at a time: by default, a plain graph processes ten and needs the memory of ten.
    like = function(tf.nest.map_structure(lambda array: array[0], arrays))  # never computed
    signature = tf.nest.map_structure(tf.TensorSpec.from_tensor, like)
    return tf.map_fn(function, arrays, fn_output_signature=signature, parallel_iterations=1)


def write_cache(cache: tf.Tensor, new: tf.Tensor, slots: tf.Tensor) -> tf.Tensor:
    if slots.shape[1] != 1 or not (_in_xla.get() and _on_cpu()):
        rows = tf.broadcast_to(tf.range(tf.shape(slots)[0])[:, None], tf.shape(slots))
        return tf.tensor_scatter_nd_update(cache, tf.stack([rows, slots], axis=-1), new)
    # As integers, because XLA on CPU converts a bfloat16 cache to float32 to update it.
    bits = tf.as_dtype(f"uint{8 * cache.dtype.size}")
    is_slot = tf.range(tf.shape(cache)[1])[None] == slots
    written = tf.where(is_slot[:, :, None, None], tf.bitcast(new, bits), tf.bitcast(cache, bits))
    return tf.bitcast(written, cache.dtype)


def _concrete(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that calls a `tf.function` through its concrete functions.

    All shapes are static, so each new combination of shapes is traced, and callers bound their
    number. A direct call would warn about these traces as frequent retracing.
    """

    def call(*args: Any) -> Any:
        if not tf.executing_eagerly():
            return function(*args)
        return function.get_concrete_function(*args)(*args)

    return call


def compile(program: Callable[..., Any], donate: int | None = None) -> Callable[..., Any]:
    return _concrete(tf.function(program, autograph=False))


def _by_xla(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def traced(*args: Any) -> Any:
        token = _in_xla.set(True)
        try:
            return function(*args)
        finally:
            _in_xla.reset(token)

    return tf.function(traced, jit_compile=True, autograph=False)


def jit_part(function: Callable[..., Any]) -> Callable[..., Any]:
    # XLA compiles a decode step as a whole, so only the output head of a prefill benefits.
    return _by_xla(function)


def while_loop(
    cond: Callable[[Any], Any], step: Callable[[Any, Any], Any]
) -> Callable[[Any, Any, int], Any]:
    compiled = _concrete(_by_xla(step))
    return lambda weights, state, limit: stepping.run(cond, compiled, weights, state, limit)


def requires_grad(x: tf.Tensor) -> tf.Tensor:
    return tf.stop_gradient(x)


def free_memory() -> int | None:
    return host.free_memory() if _on_cpu() else None  # TensorFlow reserves a whole GPU at start


def peak_device_memory() -> int | None:
    return None if _on_cpu() else tf.config.experimental.get_memory_info("GPU:0")["peak"]


def memory_bandwidth() -> float:
    array = tf.ones((1 << 14, 1 << 14), tf.float32)
    # One sum per row, because XLA runs a sum over all numbers on a single thread.
    read = tf.function(lambda array: tf.reduce_sum(array, axis=-1), jit_compile=True)
    read(array).numpy()
    fastest = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        read(array).numpy()
        fastest = min(fastest, time.perf_counter() - start)
    return 4 * (1 << 28) / fastest
