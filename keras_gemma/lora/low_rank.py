"""Low-rank update of one matrix: LoRA (Hu et al., 2021, arXiv:2106.09685).

    y = W x + s B (A x)        W [out, in] frozen, A [r, in], B [out, r], s the scale

Knows a single matrix. `adapters.py` decides which matrices of a model are adapted.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_gemma import backend

MERGED_ROWS = 1024
"""Rows of a matrix that are merged at a time, in float32."""


class LoraWeight(NamedTuple):
    """Packed matrix with a low-rank update."""

    packed: Any
    a: Any  # [r, in]
    b: Any  # [out, r], already scaled
    drop: Callable[[Any], Any] | None = None  # dropout of the input of `a`


@dataclasses.dataclass(frozen=True)
class LowRank:
    """Variables of one low-rank update."""

    a: keras.Variable  # [r, in]
    b: keras.Variable  # [out, r]
    scale: float

    def with_lora(self, packed: Any, dtype: str) -> LoraWeight:
        """Returns `packed` with this update in `dtype`."""
        b = ops.cast(self.b.value * self.scale, dtype)
        return LoraWeight(packed, ops.cast(self.a.value, dtype), b)

    def numpy(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns A and B in float32."""
        a, b = (ops.convert_to_numpy(ops.cast(v.value, "float32")) for v in (self.a, self.b))
        return a, b

    def assign(self, a: np.ndarray, b: np.ndarray) -> None:
        """Assigns A and B."""
        self.a.assign(a)
        self.b.assign(b)

    def merged_with(self, matrix: np.ndarray) -> np.ndarray:
        """Returns `matrix + s B A`, `[out, in]`, in the dtype of `matrix`, rounded once."""
        return merge_update(matrix, *self.numpy(), self.scale)


def merge_update(matrix: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    """Returns `matrix + s B A`, `[out, in]`, in the dtype of `matrix`, rounded once."""
    matrix = np.array(matrix)
    for start in range(0, len(matrix), MERGED_ROWS):
        rows = slice(start, start + MERGED_ROWS)
        matrix[rows] = matrix[rows].astype("float32") + scale * (b[rows] @ a)
    return matrix


def low_rank_product(x: Any, weight: LoraWeight) -> Any:
    """Returns the update's product with `x [..., in]`: `[..., out]`."""
    if weight.drop is not None:
        x = weight.drop(x)
    return backend.matmul(backend.matmul(x, weight.a), weight.b)


def scale_of(rank: int, alpha: float, use_rslora: bool) -> float:
    """Returns `alpha / r`, or `alpha / sqrt(r)` (rsLoRA: Kalajdzievski, 2023, arXiv:2312.03732)."""
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def init_lora_a(shape: tuple[int, int], random: np.random.Generator) -> np.ndarray:
    """Returns an initial A `[r, in]`, as in PEFT: uniform up to 1 / sqrt(in). B starts at 0."""
    bound = 1 / math.sqrt(shape[1])
    return random.uniform(-bound, bound, shape).astype("float32")
