"""Speed of multiplying a few rows by each matrix of a model, for each layout of the matrix.

    KERAS_BACKEND=jax python examples/benchmarks/kernels.py --shape gemma2_2b_en

The layout that `backend.pack` chooses is compared with plain matrices, both compiled as in
decoding. The table has the GB/s of weights read, by number of rows.
"""

import argparse
import math
import time
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_gemma import backend
from keras_gemma.benchmark.machine import place
from keras_gemma.benchmark.random_model import random_array
from keras_gemma.catalogue import presets
from keras_gemma.config import GemmaConfig

WORKING_SET_BYTES = 256 << 20
"""Total size of the matrices that are read in turn, larger than the caches of a processor."""

MAX_MATRICES = 16
"""Maximum number of matrices that are read in turn."""

MIN_SECONDS = 0.2
"""Minimum duration of a measurement, in seconds. The best of three counts."""


class Layout(NamedTuple):
    """Layout of a matrix, and the product with it."""

    pack: Callable[[np.ndarray, str, str], np.ndarray]
    """Function `(weight [out, in], kind, dtype) -> stored array`."""
    matmul: Callable[[Any, Any], Any]
    """Function `(x [rows, in], stored array) -> [rows, out]`."""


LAYOUTS = {
    "packed": Layout(backend.pack, backend.matmul),
    "x @ W.T": Layout(
        lambda weight, kind, dtype: backend.as_aligned(weight, dtype),
        lambda x, weight: ops.matmul(x, ops.transpose(weight)),
    ),
    "x @ W": Layout(lambda weight, kind, dtype: backend.as_aligned(weight.T, dtype), ops.matmul),
}


class Matrix(NamedTuple):
    """Matrix of the model. Others of the same shape are in its name."""

    name: str
    shape: tuple[int, int]
    kind: str


def matrices(config: GemmaConfig) -> list[Matrix]:
    """Returns the distinct matrices `[out, in]` of a model."""
    shapes = config.weight_shapes()
    names = {
        "query": "query",
        "key": "key, value",
        "output": "output",
        "gate": "gate, up",
        "down": "down",
    }
    blocks = [Matrix(name, shapes[f"layers.0.{part}"], "matrix") for part, name in names.items()]
    return [*blocks, Matrix("head", shapes["token_embedding"], "embedding")]


def measure(matrix: Matrix, layout: Layout, dtype: str, rows: int) -> float:
    """Returns the GB/s at which `rows` rows are multiplied by the matrix."""
    size = math.prod(matrix.shape) * np.dtype(dtype).itemsize
    count = min(MAX_MATRICES, math.ceil(WORKING_SET_BYTES / size))
    weights = {}
    for i in range(count):
        array = random_array(matrix.shape, dtype, seed=i)
        weights[str(i)] = place(layout.pack(array, matrix.kind, dtype))
    seconds = seconds_per_pass(layout.matmul, weights, (rows, matrix.shape[1]), dtype)
    return size * count / seconds / 1e9


def seconds_per_pass(
    matmul: Callable[[Any, Any], Any], weights: dict[str, Any], shape: tuple[int, int], dtype: str
) -> float:
    """Returns the duration of multiplying `x` by each of `weights` in turn."""

    def multiply_by_all(x: Any, weights: dict[str, Any]) -> Any:
        for packed in weights.values():
            # Each product depends on the one before, so that the compiler cannot remove any.
            x = x + ops.mean(matmul(x, packed), axis=-1, keepdims=True) * 1e-3
        return x

    part = backend.jit_part(copy_code(multiply_by_all))
    run = backend.while_loop(lambda x: True, lambda weights, x: part(x, weights))
    x = ops.convert_to_tensor(random_array(shape, dtype))

    def time_passes(count: int) -> float:
        nonlocal x
        start = time.perf_counter()
        x = run(weights, x, count)
        ops.convert_to_numpy(x)
        return time.perf_counter() - start

    time_passes(1)  # compiles
    time_passes(1)  # PyTorch compiles again for the output of its own program.
    count = max(1, math.ceil(MIN_SECONDS / time_passes(1)))
    return min(time_passes(count) for _ in range(3)) / count


def copy_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a copy with a new code object: PyTorch limits the number of programs of each."""
    return types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="gemma2_2b_en", help="preset with the sizes")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8])
    options = parser.parse_args()
    print(f"memory bandwidth {backend.memory_bandwidth() / 1e9:.3g} GB/s")
    cells = ["matrix", "out x in", "layout", *(f"{rows} rows" for rows in options.rows)]
    print(("{:<14}" * 3 + "{:>9}" * len(options.rows)).format(*cells))
    for matrix in matrices(presets()[options.shape].config):
        for name, layout in LAYOUTS.items():
            print(f"{matrix.name:<14}{'{} x {}'.format(*matrix.shape):<14}{name:<14}", end="")
            for rows in options.rows:
                print(f"{measure(matrix, layout, options.dtype, rows):>9.3g}", end="", flush=True)
            print()


if __name__ == "__main__":
    main()
