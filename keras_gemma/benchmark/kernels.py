"""A few rows times each matrix of a model: how fast the weights are read, in each form.

A form is a layout and the product with it. What `backend.pack` chose is measured beside the plain
ones, compiled as decoding compiles it. Knows no model but its sizes.
"""

import math
import time
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_gemma import backend
from keras_gemma.benchmark.machine import place
from keras_gemma.benchmark.random_model import random_array
from keras_gemma.config import GemmaConfig

ROWS = (1, 2, 4, 8)

IN_A_ROW = (256 << 20, 16)
"""Bytes, and matrices at most, that are read in turn: more than the processor's caches hold."""

LONG_ENOUGH = 0.2
"""Seconds of a measurement; the best of three counts."""


class Form(NamedTuple):
    """A layout, and the product with it."""

    pack: Callable[[np.ndarray, str, str], np.ndarray]
    """A weight `[out, in]`, its kind and dtype -> the array that is stored."""
    matmul: Callable[[Any, Any], Any]
    """`x [rows, in]` and the packed weight -> `[rows, out]`."""


FORMS = {
    "packed": Form(backend.pack, backend.matmul),
    "x @ W.T": Form(
        lambda weight, kind, dtype: backend.as_aligned(weight, dtype),
        lambda x, weight: ops.matmul(x, ops.transpose(weight)),
    ),
    "x @ W": Form(lambda weight, kind, dtype: backend.as_aligned(weight.T, dtype), ops.matmul),
}


class Matrix(NamedTuple):
    """A matrix of the model, and those of its shape."""

    name: str
    shape: tuple[int, int]
    kind: str


def matrices(config: GemmaConfig) -> list[Matrix]:
    """The different matrices that a token is multiplied with, `[out, in]`.

    Example:

    ```python
    from keras_gemma.benchmark.kernels import matrices
    from keras_gemma.catalogue import presets

    matrices(presets()["gemma2_2b_en"].config)[1]
    # Matrix(name='key, value', shape=(1024, 2304), kind='matrix')
    ```
    """
    shapes = config.weight_shapes()
    names = {
        "query": "query",
        "key": "key, value",
        "output": "output",
        "gate": "gate, up",
        "down": "down",
    }
    listed = [Matrix(name, shapes[f"layers.0.{part}"], "matrix") for part, name in names.items()]
    return [*listed, Matrix("head", shapes["token_embedding"], "embedding")]


def measure_kernels(
    config: GemmaConfig, dtype: str, rows: tuple[int, ...] | None = None
) -> Iterator[dict[str, Any]]:
    """One entry for each matrix, form and number of rows, as soon as it is measured.

    Args:
        config: the model's sizes.
        dtype: of weights and rows.
        rows: how many are multiplied at once; by default 1, 2, 4 and 8.
    """
    for matrix in matrices(config):
        for name, form in FORMS.items():
            weights = _weights(matrix, form, dtype)
            size = math.prod(matrix.shape) * np.dtype(dtype).itemsize * len(weights)
            for count in rows or ROWS:
                seconds = _seconds_a_pass(form.matmul, weights, (count, matrix.shape[1]), dtype)
                yield {
                    "matrix": matrix.name,
                    "shape": list(matrix.shape),
                    "form": name,
                    "rows": count,
                    "gb_per_second": float(f"{size / seconds / 1e9:.3g}"),
                }


def count_kernels(config: GemmaConfig, rows: tuple[int, ...] | None = None) -> int:
    """How many entries `measure_kernels` gives."""
    return len(matrices(config)) * len(FORMS) * len(rows or ROWS)


def _weights(matrix: Matrix, form: Form, dtype: str) -> dict[str, Any]:
    """Matrices of this shape in the form's layout, on the device."""
    enough, most = IN_A_ROW
    size = math.prod(matrix.shape) * np.dtype(dtype).itemsize
    weights = {}
    for i in range(min(most, math.ceil(enough / size))):
        packed = form.pack(random_array(matrix.shape, dtype, seed=i), matrix.kind, dtype)
        weights[str(i)] = place(packed)
    return weights


def _seconds_a_pass(
    matmul: Callable[[Any, Any], Any], weights: dict[str, Any], shape: tuple[int, int], dtype: str
) -> float:
    """Seconds of `x` times each of `weights`, one after the other."""

    def one_after_the_other(x: Any, weights: dict[str, Any]) -> Any:
        for packed in weights.values():
            # A little of each product goes on, so that none may be left out or moved.
            x = x + ops.mean(matmul(x, packed), axis=-1, keepdims=True) * 1e-3
        return x

    part = backend.jit_part(_as_new_code(one_after_the_other))
    run = backend.while_loop(lambda x: True, lambda weights, x: part(x, weights))
    x = ops.convert_to_tensor(random_array(shape, dtype))

    def time_passes(count: int) -> float:
        nonlocal x
        start = time.perf_counter()
        x = run(weights, x, count)
        ops.convert_to_numpy(x)
        return time.perf_counter() - start

    time_passes(1)  # compiles
    time_passes(1)  # PyTorch does again, for what a program of its own gave
    count = max(1, math.ceil(LONG_ENOUGH / time_passes(1)))
    return min(time_passes(count) for _ in range(3)) / count


def _as_new_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with code of its own: PyTorch stops compiling after so many programs of one."""
    return types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
