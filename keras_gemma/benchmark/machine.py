"""Matrix throughput of the machine, on the Keras backend and its threads.

The memory bandwidth is measured by the backend's `memory_bandwidth`.
"""

import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_gemma import backend
from keras_gemma.benchmark.random_model import random_array

SIZES = (1024, 2048, 4096, 8192)
"""Sizes of the square matrices to measure."""

MAX_SECONDS = 0.05
"""Duration of a product beyond which larger ones are not measured, in seconds."""


def matrix_throughput(dtype: str) -> float:
    """Returns the FLOP/s of the fastest product of two square matrices in `dtype`.

    Measures several sizes, both layouts of the second matrix, and the backend's product with a
    packed matrix, each three times.
    """

    # The programs return only the maxima, so that copying the result takes no time.
    def plain(x: Any, y: Any) -> Any:
        return ops.max(ops.matmul(x, y), axis=-1)

    def transposed(x: Any, y: Any) -> Any:
        return ops.max(ops.matmul(x, ops.transpose(y)), axis=-1)

    def packed(x: Any, y: Any) -> Any:
        return ops.max(backend.matmul(x, y), axis=-1)

    fastest = 0.0
    for size in SIZES:
        noise = random_array((size, size), dtype)
        x = place(noise)
        y = place(backend.pack(noise.copy(), "matrix", dtype))
        programs = (plain, x), (transposed, x), (packed, y)
        seconds = min(_best_seconds(backend.compile(form), x, other) for form, other in programs)
        fastest = max(fastest, 2 * size**3 / seconds)
        if seconds > MAX_SECONDS:
            break
    return fastest


def best_product(dtype: str) -> tuple[float, str]:
    """Returns the FLOP/s of the fastest product in `dtype` or float32, and its dtype.

    A prefill in 16 bits may use either: many CPUs have no 16-bit instructions and are faster in
    float32.
    """
    return max((matrix_throughput(name), name) for name in sorted({dtype, "float32"}))


def place(packed: np.ndarray) -> Any:
    """Returns an array of `backend.pack` as a tensor on the device."""
    with backend.uninitialized():
        variable = keras.Variable(initializer="zeros", shape=packed.shape, dtype=packed.dtype.name)
    backend.assign(variable, packed)
    return variable.value


def _best_seconds(program: Callable[..., Any], *inputs: Any) -> float:
    best = float("inf")
    for _ in range(4):  # the first one compiles
        start = time.perf_counter()
        ops.convert_to_numpy(program(*inputs))
        best = min(best, time.perf_counter() - start)
    return best
