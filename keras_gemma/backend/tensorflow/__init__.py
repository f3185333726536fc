"""Implementation of the contract on TensorFlow.

Prefill runs as a plain graph, and XLA compiles a decode step. `cpu.py` has the kernels for CPU.
AutoGraph is off, because its search for control flow would take a third of the tracing time.
"""

import timeit
from collections.abc import Callable
from contextvars import ContextVar
from functools import lru_cache, wraps
from types import ModuleType
from typing import Any

import numpy as np
import tensorflow as tf
from keras import ops
from tensorflow import Tensor

from keras_gemma.backend import host, packing, quantized, reference
from keras_gemma.backend.quantized import Quantized
from keras_gemma.backend.tensorflow import cpu
from keras_gemma.backend.xla_cpu import xla_quantized

_in_xla = ContextVar("in_xla", default=False)
"""True while tracing a function that XLA compiles."""


@lru_cache
def on_cpu() -> bool:
    return not tf.config.list_physical_devices("GPU")


to_numpy = ops.convert_to_numpy


def from_numpy(packed: np.ndarray) -> Tensor:
    if packed.ctypes.data % packing.ALIGNMENT or not packed.flags.writeable or not on_cpu():
        return tf.convert_to_tensor(packed)
    bits = packed.view(f"uint{8 * packed.itemsize}")  # DLPack does not support NumPy's bfloat16
    return tf.bitcast(tf.experimental.dlpack.from_dlpack(bits.__dlpack__()), packed.dtype.name)


def _flatten(x: Tensor) -> Tensor:
    return tf.reshape(x, (-1, x.shape[-1]))


def _unflatten(rows: Tensor, like: Tensor) -> Tensor:
    """Returns `rows [rows, n]` with the other axes of `like`: `[..., n]`."""
    y = tf.reshape(rows, tf.concat([tf.shape(like)[:-1], tf.shape(rows)[-1:]], axis=0))
    y.set_shape([*like.shape[:-1], rows.shape[-1]])
    return y


def matmul(x: Tensor, packed: Tensor) -> Tensor:
    packed = tf.convert_to_tensor(packed)
    rows = _flatten(x)
    special = x.dtype == tf.bfloat16 and on_cpu()
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
    return _unflatten(y, x)


def matmul_transposed(y: Tensor, packed: Tensor) -> Tensor:
    return _unflatten(tf.matmul(_flatten(y), packed), y)


def quantized_layout() -> ModuleType:
    # On an accelerator XLA fuses dequantization and product.
    return xla_quantized if on_cpu() else quantized


def quantized_matmul(x: Tensor, packed: Quantized) -> Tensor:
    packed = packed.map(tf.convert_to_tensor)

    def gradient(dy: Tensor) -> Tensor:  # needs only the packed weight, in a plain graph
        if not on_cpu():
            return quantized.matmul_transposed(dy, packed)
        return _unflatten(cpu.quantized_matmul_transposed(_flatten(dy), packed), dy)

    @tf.custom_gradient
    def product(x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        if not on_cpu():
            return quantized.matmul(x, packed), gradient
        y = cpu.quantized_matmul(_flatten(x), packed, in_xla=_in_xla.get())
        return _unflatten(y, x), gradient

    return product(x)


def embed(ids: Tensor, packed: Tensor) -> Tensor:
    # A tensor, because TensorFlow copies the whole of a variable before a lookup.
    return tf.gather(tf.convert_to_tensor(packed), ids)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, scale: float, soft_cap: float | None
) -> Tensor:
    inputs, options = (query, key, value, mask), {"scale": scale, "soft_cap": soft_cap}
    if query.shape[1] == 1 and value.dtype == tf.bfloat16 and _in_xla.get() and on_cpu():
        return cpu.attend_one_query(*inputs, **options)
    return reference.attend(*inputs, **options)


log_sum_and_max = reference.log_sum_and_max
_compiled_cross_entropy = tf.function(reference.cross_entropy, jit_compile=True, autograph=False)


def cross_entropy(
    products: Tensor, target_ids: Tensor, soft_cap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    # XLA fuses this into a few loops; a plain graph allocates ten arrays of this size.
    return _compiled_cross_entropy(products, target_ids, soft_cap)


def map(function: Callable[..., Any], arrays: Any) -> Any:
    # One at a time: by default, a plain graph processes ten and needs the memory of ten.
    like = function(tf.nest.map_structure(lambda array: array[0], arrays))  # never computed
    signature = tf.nest.map_structure(tf.TensorSpec.from_tensor, like)
    return tf.map_fn(function, arrays, fn_output_signature=signature, parallel_iterations=1)


def write_cache(cache: Tensor, new: Tensor, slots: Tensor) -> Tensor:
    if slots.shape[1] == 1 and _in_xla.get() and on_cpu():
        return cpu.write_one_slot(cache, new, slots)
    rows = tf.broadcast_to(tf.range(tf.shape(slots)[0])[:, None], tf.shape(slots))
    return tf.tensor_scatter_nd_update(cache, tf.stack([rows, slots], axis=-1), new)


def insert_row(array: Tensor, row: Tensor, at: Tensor) -> Tensor:
    return tf.tensor_scatter_nd_update(array, tf.reshape(at, (1, 1)), row)


def _concrete(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that calls a `tf.function` through its concrete functions.

    All shapes are static, so each new combination of shapes is traced, and callers bound their
    number. A direct call would warn about these traces as frequent retracing.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        if not tf.executing_eagerly():
            return function(*args, **kwargs)
        return function.get_concrete_function(*args, **kwargs)(*args, **kwargs)

    return call


def compile(program: Callable[..., Any], donate: int | None = None) -> Callable[..., Any]:
    return _concrete(tf.function(program, autograph=False))


def jit_part(function: Callable[..., Any]) -> Callable[..., Any]:
    # XLA compiles a decode step as a whole, so only the output head of a prefill benefits.
    @wraps(function)
    def traced(*args: Any) -> Any:
        token = _in_xla.set(True)
        try:
            return function(*args)
        finally:
            _in_xla.reset(token)

    return tf.function(traced, jit_compile=True, autograph=False)


def compile_step(step: Callable[..., Any], donate: int | None = None) -> Callable[..., Any]:
    return _concrete(jit_part(step))


def while_loop(
    cond: Callable[[Any], Any], step: Callable[[Any, Any], Any]
) -> Callable[[Any, Any, int], Any]:
    return reference.while_loop(cond, compile_step(step))


requires_grad = tf.stop_gradient


def free_memory() -> int | None:
    return host.free_memory() if on_cpu() else None  # TensorFlow reserves a whole GPU at start


def peak_device_memory() -> int | None:
    return None if on_cpu() else tf.config.experimental.get_memory_info("GPU:0")["peak"]


def release_threads() -> None:
    """Does nothing: TensorFlow has one pool of threads for all callers."""


def memory_bandwidth() -> float:
    array = tf.ones((1 << 14, 1 << 14), tf.float32)
    # One sum per row, because XLA runs a sum over all numbers on a single thread.
    read = tf.function(lambda array: tf.reduce_sum(array, axis=-1), jit_compile=True)
    return 4 * (1 << 28) / min(timeit.repeat(lambda: read(array).numpy(), repeat=6, number=1))
