"""Weights of a model by name, with matrices `[out, in]` as in files, independent of the layout."""

import dataclasses
import math
import random
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_gemma import backend
from keras_gemma.backend import quantized
from keras_gemma.model.matrix import INITIAL_DEVIATION, MatrixLayer

RANDOM_CHUNK = 1 << 20
"""Numbers that are drawn at a time; few enough for the processor's cache."""


def stop_gradients(tensors: Any) -> Any:
    """Returns nested tensors as constants, for which no gradients are computed."""
    return keras.tree.map_structure(
        lambda x: None if x is None else keras.ops.stop_gradient(x), tensors
    )


@dataclasses.dataclass(frozen=True)
class NamedWeight:
    """Weight in floating point."""

    variable: keras.Variable
    shape: tuple[int, ...]
    kind: str
    adapted: Callable[[np.ndarray], np.ndarray] = lambda array: array
    """Merges the applied LoRA update into the weight, as `MatrixLayer.adapted`."""

    relative_error = 0.0

    @property
    def dtype(self) -> str:
        return self.variable.dtype

    @property
    def plain_dtype(self) -> str:
        """Dtype of `numpy()`. May differ from `dtype`, because JAX stores float64 as float32."""
        return keras.backend.standardize_dtype(self.variable.value.dtype)

    @property
    def plain_bytes(self) -> int:
        """Bytes of `numpy()`."""
        return math.prod(self.shape) * np.dtype(self.plain_dtype).itemsize

    bytes = plain_bytes
    """Bytes of the weight in memory."""

    def pack(self, array: np.ndarray) -> np.ndarray:
        """Packs `array`, of `shape`, as the variable stores it, without a copy if possible."""
        _check_shape(array, self.shape, self.variable.path)
        return backend.pack(array, self.kind, self.dtype)

    def take(self, packed: np.ndarray) -> None:
        """Assigns the result of `pack`, whose memory the variable may share."""
        backend.assign(self.variable, packed)

    def assign(self, array: np.ndarray) -> None:
        """Assigns a copy of `array`, of `shape`."""
        self.take(self.pack(np.array(array)))

    def numpy(self) -> np.ndarray:
        """Returns the weight, merged with its applied LoRA update, as a NumPy array of `shape`."""
        array = backend.unpack(backend.to_numpy(self.variable.value), self.shape)
        return self.adapted(array)


@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """Weight in 8 or 4 bits. `pack` quantizes it and `numpy` dequantizes it."""

    name: str
    layer: MatrixLayer
    shape: tuple[int, ...]
    kind: str

    plain_bytes = NamedWeight.plain_bytes

    @property
    def bits(self) -> int:
        return self.layer.layout.bits

    @property
    def dtype(self) -> str:
        return f"int{self.bits}"

    @property
    def plain_dtype(self) -> str:
        """Dtype of `numpy()`: the dtype of the model's other weights."""
        return self.layer.variable_dtype

    @property
    def bytes(self) -> int:
        """Bytes of the weight in memory, including scales and zero points."""
        variables = [v for v in self.layer.variables_of_matrix if v is not None]
        return sum(math.prod(v.shape) * np.dtype(v.dtype).itemsize for v in variables)

    @property
    def relative_error(self) -> float | None:
        """Norm of the quantization error over the norm of the weight. `None` if unknown."""
        return self.layer.relative_error

    def pack(self, array: np.ndarray) -> tuple[backend.Quantized, float]:
        """Quantizes float `array`, of `shape`, to the backend's layout; also returns its error."""
        _check_shape(array, self.shape, self.layer.path)
        return self.layer.pack_quantized(array, self.name)

    def pack_plain_form(self, plain: backend.Quantized) -> tuple[backend.Quantized, None]:
        """Packs the arrays of a file, with two 4-bit values per byte as in `quantized.pack`."""
        if self.bits == 8:
            return backend.quantized_pack(plain, self.kind, 8), None

        def plain_rows(rows: slice) -> backend.Quantized:
            return quantized.unpack(plain.map(lambda part: part[rows]), self.shape)

        return self.pack_plain_rows(plain_rows)

    def pack_plain_rows(
        self, plain_rows: Callable[[slice], backend.Quantized]
    ) -> tuple[backend.Quantized, None]:
        """Packs the weight in chunks. `plain_rows` returns the plain form of some rows."""
        layout = self.layer.layout
        return backend.quantized_pack_rows(self.shape, self.kind, layout, plain_rows), None

    def take(self, packed: tuple[backend.Quantized, float | None]) -> None:
        """Assigns the result of `pack` or `pack_plain_form`."""
        self.layer.take_quantized(*packed)

    def assign(self, array: np.ndarray) -> None:
        """Quantizes and assigns `array`, of `shape`."""
        self.take(self.pack(array))

    def numpy(self) -> np.ndarray:
        """Returns the dequantized weight, merged with its LoRA update, as an array of `shape`."""
        return self.layer.adapted(self.layer.numpy())

    def plain_form(self) -> backend.Quantized:
        """Returns the quantized weight in the plain form of files."""
        return self.layer.plain_form()


def randomize(weights: dict[str, NamedWeight | QuantizedWeight], dtype: str) -> None:
    """Draws initial weights: normal matrices, and norms of zeros. `keras.utils` sets the seed.

    Quantized weights are drawn in `dtype`. The numbers are drawn in chunks, straight into the
    memory of a weight. Keras's initializers need several times that memory on JAX.
    """
    rng = np.random.default_rng(random.getrandbits(64))
    chunk = np.empty(RANDOM_CHUNK, "float32")
    for weight in weights.values():
        array = backend.empty(weight.shape, dtype)
        flat = array.reshape(-1)
        if array.ndim == 1:
            flat[:] = 0
        for start in range(0, flat.size if array.ndim > 1 else 0, RANDOM_CHUNK):
            rng.standard_normal(out=chunk, dtype="float32")
            chunk *= INITIAL_DEVIATION
            part = flat[start : start + RANDOM_CHUNK]
            part[:] = chunk[: part.size]
        weight.take(weight.pack(array))


def _check_shape(array: np.ndarray, shape: tuple[int, ...], path: str) -> None:
    if tuple(array.shape) != shape:
        raise ValueError(
            f"{path} requires an array of shape {shape}. Received: array.shape={tuple(array.shape)}"
        )
