"""Implementation of the contract on TensorFlow.

Prefill runs as a plain graph, and XLA compiles a decode step. `cpu.py` has the kernels for CPU.
AutoGraph is off, because its search for control flow would take a third of the tracing time.
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

from keras_gemma.backend import host, packing, quantized, reference, stepping
from keras_gemma.backend.quantized import Quantized
from keras_gemma.backend.tensorflow import cpu
from keras_gemma.backend.xla_cpu import xla_quantized

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


def matmul(x: tf.Tensor, packed: tf.Tensor) -> tf.Tensor:
    packed = tf.convert_to_tensor(packed)
    rows = tf.reshape(x, (-1, x.shape[-1]))
    special = x.dtype == tf.bfloat16 and _on_cpu()
    if special and rows.shape[0] == 1:
        y = cpu.one_row(rows, packed)
    elif special and _in_xla.get():
        y = cpu.rows_in_xla(rows, packed)
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


def _quantized_gradient(dy: tf.Tensor, packed: Quantized) -> tf.Tensor:
    """Returns the gradient of `_quantized_product` with respect to `x`, in a plain graph."""
    if not _on_cpu():
        return quantized.matmul_transposed(dy, packed)
    dx = cpu.quantized_matmul_transposed(tf.reshape(dy, (-1, dy.shape[-1])), packed)
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
    y = cpu.quantized_matmul(tf.reshape(x, (-1, x.shape[-1])), packed, in_xla=_in_xla.get())
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
        return cpu.attend_one_query(*inputs, **options)
    return reference.attend(*inputs, **options)


_compiled_cross_entropy = tf.function(reference.cross_entropy, jit_compile=True, autograph=False)


def cross_entropy(
    products: tf.Tensor, target_ids: tf.Tensor, soft_cap: float | None
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    # XLA fuses this into a few loops; a plain graph allocates ten arrays of this size.
    return _compiled_cross_entropy(products, target_ids, soft_cap)


def map(function: Callable[..., Any], arrays: Any) -> Any:
    # One at a time: by default, a plain graph processes ten and needs the memory of ten.
    like = function(tf.nest.map_structure(lambda array: array[0], arrays))  # never computed
    signature = tf.nest.map_structure(tf.TensorSpec.from_tensor, like)
    return tf.map_fn(function, arrays, fn_output_signature=signature, parallel_iterations=1)


def write_cache(cache: tf.Tensor, new: tf.Tensor, slots: tf.Tensor) -> tf.Tensor:
    if slots.shape[1] == 1 and _in_xla.get() and _on_cpu():
        return cpu.write_one_slot(cache, new, slots)
    rows = tf.broadcast_to(tf.range(tf.shape(slots)[0])[:, None], tf.shape(slots))
    return tf.tensor_scatter_nd_update(cache, tf.stack([rows, slots], axis=-1), new)


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
