"""A product of low rank beside a matrix: LoRA (Hu et al., 2021, arXiv:2106.09685).

    y = W x + s B (A x)        W [out, in] as it was, A [r, in], B [out, r], s a number

Knows one matrix. Which matrices of a model have one, and under what name, is `adapters.py`'s.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_gemma import backend

ROWS = 1024
"""Of a matrix that are added to at once, in float32."""


class Adapted(NamedTuple):
    """A packed matrix, and what is added to its product."""

    packed: Any
    a: Any  # [r, in]
    b: Any  # [out, r], the scale in it
    drop: Callable[[Any], Any] | None = None  # what training does to x on its way to `a`


@dataclasses.dataclass(frozen=True)
class LowRank:
    """The variables of one product."""

    a: keras.Variable  # [r, in]
    b: keras.Variable  # [out, r]
    scale: float

    def beside(self, packed: Any, dtype: str) -> Adapted:
        """As a factor in `dtype`, beside a packed matrix."""
        b = ops.cast(self.b.value * self.scale, dtype)
        return Adapted(packed, ops.cast(self.a.value, dtype), b)

    def numpy(self) -> tuple[np.ndarray, np.ndarray]:
        """A and B, float32."""
        a, b = (ops.convert_to_numpy(ops.cast(v.value, "float32")) for v in (self.a, self.b))
        return a, b

    def assign(self, a: np.ndarray, b: np.ndarray) -> None:
        """Store A and B."""
        self.a.assign(a)
        self.b.assign(b)

    def added_to(self, matrix: np.ndarray) -> np.ndarray:
        """`matrix + s B A`, `[out, in]`, in its dtype, rounded once."""
        a, b = self.numpy()
        matrix = np.array(matrix)
        for start in range(0, len(matrix), ROWS):
            rows = slice(start, start + ROWS)
            matrix[rows] = matrix[rows].astype("float32") + self.scale * (b[rows] @ a)
        return matrix


def low_rank_product(x: Any, weight: Adapted) -> Any:
    """What is added to the product with `x [..., in]` -> `[..., out]`."""
    if weight.drop is not None:
        x = weight.drop(x)
    return backend.matmul(backend.matmul(x, weight.a), weight.b)


def scale_of(rank: int, alpha: float, use_rslora: bool) -> float:
    """`alpha / r`, or `alpha / sqrt(r)` (rsLoRA: Kalajdzievski, 2023, arXiv:2312.03732)."""
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def first_a(shape: tuple[int, int], random: np.random.Generator) -> np.ndarray:
    """A `[r, in]` before training, as peft has it: uniform up to 1 / sqrt(in). B begins as 0."""
    bound = 1 / math.sqrt(shape[1])
    return random.uniform(-bound, bound, shape).astype("float32")
