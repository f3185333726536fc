"""The contract on TensorFlow.

One row is fastest under XLA, on the layout of `packing.py`; many rows are fastest outside of XLA,
where oneDNN multiplies bf16 three times as fast on CPU. So a prompt runs as a plain graph, and a
decoding step is compiled by XLA.
"""

import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import tensorflow as tf

from keras_gemma.backend import host, packing, stepping
from keras_gemma.backend.reference import attend

__all__ = ["attend"]

FEW_ROWS = 8
"""Up to so many rows, a pass over the weights for each row beats XLA's product of several."""


@lru_cache
def _on_cpu() -> bool:
    return not tf.config.list_physical_devices("GPU")


def packed_shape(shape: tuple[int, ...], kind: str) -> tuple[int, ...]:
    return packing.packed_shape(shape, kind) if _on_cpu() else shape


def pack(weight: np.ndarray, kind: str, dtype: Any = None) -> np.ndarray:
    return (packing.pack if _on_cpu() else packing.pack_rows)(weight, kind, dtype)


unpack = packing.unpack


def adopt(packed: np.ndarray) -> tf.Tensor:
    if packed.ctypes.data % packing.ALIGNMENT or not packed.flags.writeable or not _on_cpu():
        return tf.convert_to_tensor(packed)
    bits = packed.view(f"uint{8 * packed.itemsize}")  # DLPack knows no bfloat16 of NumPy's
    return tf.bitcast(tf.experimental.dlpack.from_dlpack(bits.__dlpack__()), packed.dtype.name)


def _one_row(x: tf.Tensor, packed: tf.Tensor) -> tf.Tensor:
    """`x [1, in]` -> `[1, out]`."""
    if packed.shape.rank == 2:
        return tf.matmul(x, packed, transpose_b=True)
    parts = tf.split(x, packed.shape[0], axis=1)
    return tf.add_n([tf.matmul(part, packed[i], transpose_b=True) for i, part in enumerate(parts)])


def matmul(x: tf.Tensor, packed: tf.Tensor) -> tf.Tensor:
    packed = tf.convert_to_tensor(packed)
    rows = tf.reshape(x, (-1, x.shape[-1]))
    count = rows.shape[0]
    if count is not None and count <= FEW_ROWS and x.dtype == tf.bfloat16 and _on_cpu():
        y = tf.concat([_one_row(rows[i : i + 1], packed) for i in range(count)], axis=0)
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


def embed(ids: tf.Tensor, packed: tf.Tensor) -> tf.Tensor:
    return tf.gather(packed, ids)


def write_cache(cache: tf.Tensor, new: tf.Tensor, slots: tf.Tensor) -> tf.Tensor:
    rows = tf.broadcast_to(tf.range(slots.shape[0])[:, None], slots.shape)
    return tf.tensor_scatter_nd_update(cache, tf.stack([rows, slots], axis=-1), new)


def compile(program: Callable[..., Any], donate: int | None = None) -> Callable[..., Any]:
    return tf.function(program, reduce_retracing=False)


def fuse(function: Callable[..., Any]) -> Callable[..., Any]:
    # Within a step XLA compiles this with the rest; the head of a prompt, one row, profits alone.
    return tf.function(function, jit_compile=True)


def loop(
    proceed: Callable[[Any], Any], step: Callable[[Any, Any], Any]
) -> Callable[[Any, Any, int], Any]:
    compiled = tf.function(step, jit_compile=True)
    return lambda weights, state, limit: stepping.run(proceed, compiled, weights, state, limit)


def free_memory() -> int | None:
    return host.free_memory() if _on_cpu() else None  # TensorFlow takes all of a GPU at its start


def memory_bandwidth() -> float:
    array = tf.ones((1 << 28,), tf.float32)
    read = tf.function(tf.reduce_sum, jit_compile=True)
    read(array).numpy()
    fastest = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        read(array).numpy()
        fastest = min(fastest, time.perf_counter() - start)
    return 4 * (1 << 28) / fastest
