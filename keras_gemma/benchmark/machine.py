"""What this machine reaches, on Keras's backend and with as many threads as a model has.

Reading is the backend's own `memory_bandwidth`; multiplying is measured here.
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
"""Rows and columns of the square matrices that are tried."""

LONG_ENOUGH = 0.05
"""Seconds of a product from which a larger one tells nothing new."""


def matrix_throughput(dtype: str) -> float:
    """FLOP/s of the best product of two square matrices in `dtype`.

    Sizes, both layouts of the second matrix, and the backend's own product with a packed one are
    tried, each the best of three.

    Example:

    ```python
    from keras_gemma.benchmark.machine import matrix_throughput

    matrix_throughput("float32") / 1e9  # GFLOP/s
    ```
    """

    # Only the largest elements leave the program, so that copying them out takes no time.
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
        if seconds > LONG_ENOUGH:
            break
    return fastest


def best_product(dtype: str) -> tuple[float, str]:
    """FLOP/s of the best product in `dtype` or in float32, and which of the two it was.

    A prompt in 16 bits may be read by either: without instructions for 16 bits, as on many CPUs,
    float32 is faster.
    """
    return max((matrix_throughput(name), name) for name in sorted({dtype, "float32"}))


def place(packed: np.ndarray) -> Any:
    """A tensor of the backend, on its device, with what `backend.pack` gave."""
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
