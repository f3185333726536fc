"""A model's weights as files know them: by name, matrices `[out, in]`, whatever the layout."""

import dataclasses
import math
from collections.abc import Callable

import keras
import numpy as np

from keras_gemma import backend
from keras_gemma.backend import quantized
from keras_gemma.model.matrix import MatrixLayer


@dataclasses.dataclass(frozen=True)
class NamedWeight:
    """One weight in floating point."""

    variable: keras.Variable
    shape: tuple[int, ...]
    kind: str
    adapted: Callable[[np.ndarray], np.ndarray] = lambda array: array
    """The weight, from what the variable holds; see `MatrixLayer.adapted`."""

    relative_error = 0.0

    @property
    def dtype(self) -> str:
        return self.variable.dtype

    @property
    def plain_dtype(self) -> str:
        """That of `numpy()`: JAX holds float32 where float64 was asked for."""
        return keras.backend.standardize_dtype(self.variable.value.dtype)

    @property
    def plain_bytes(self) -> int:
        """Of `numpy()`."""
        return math.prod(self.shape) * np.dtype(self.plain_dtype).itemsize

    @property
    def bytes(self) -> int:
        """That the weight takes in memory."""
        return self.plain_bytes

    def pack(self, array: np.ndarray) -> np.ndarray:
        """`array`, of `shape`, in the variable's dtype and layout; in its own memory if it can."""
        _check_shape(array, self.shape, self.variable.path)
        return backend.pack(array, self.kind, self.dtype)

    def take(self, packed: np.ndarray) -> None:
        """Store what `pack` gave; the variable may live on in its memory."""
        backend.assign(self.variable, packed)

    def assign(self, array: np.ndarray) -> None:
        """Store a copy of `array`, of `shape`, in the variable's dtype and layout."""
        self.take(self.pack(np.array(array)))

    def numpy(self) -> np.ndarray:
        """The weight as a NumPy array of `shape`, with what an adapter adds to it."""
        array = backend.unpack(backend.to_numpy(self.variable.value), self.shape)
        return self.adapted(array)


@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """One weight in 8 or 4 bits: `pack` quantizes, `numpy` gives what the bits stand for."""

    name: str
    holder: MatrixLayer
    shape: tuple[int, ...]
    kind: str

    @property
    def bits(self) -> int:
        return self.holder.quantization.bits(self.kind)

    @property
    def dtype(self) -> str:
        return f"int{self.bits}"

    @property
    def plain_dtype(self) -> str:
        """That of `numpy()`: the dtype of the model's other weights."""
        return self.holder.variable_dtype

    @property
    def plain_bytes(self) -> int:
        """Of `numpy()`."""
        return math.prod(self.shape) * np.dtype(self.plain_dtype).itemsize

    @property
    def bytes(self) -> int:
        """That the weight takes in memory, with its scales and zero points."""
        variables = [v for v in self.holder.variables_of_matrix if v is not None]
        return sum(math.prod(v.shape) * np.dtype(v.dtype).itemsize for v in variables)

    @property
    def relative_error(self) -> float | None:
        """The norm of what was lost over that of the weight; None where nobody knows."""
        return self.holder.relative_error

    def pack(self, array: np.ndarray) -> tuple[backend.Quantized, float]:
        """`array`, of `shape` and floating point, quantized and in the backend's layout."""
        _check_shape(array, self.shape, self.holder.path)
        return self.holder.pack_quantized(array, self.name)

    def pack_plain_form(self, plain: backend.Quantized) -> tuple[backend.Quantized, None]:
        """What a file has, in the backend's layout.

        Args:
            plain: 4 bits two a byte, as `backend.quantized` stores them.
        """
        if self.bits == 8:
            return backend.quantized_pack(plain, self.kind, 8), None
        config = self.holder.quantization

        def rows(here: slice) -> backend.Quantized:
            parts = (None if part is None else part[here] for part in plain)
            return quantized.unpack(backend.Quantized(*parts), self.shape)

        settings = self.kind, 4, config.group_size, config.zeros
        return backend.quantized_pack_rows(self.shape, *settings, rows), None

    def take(self, packed: tuple[backend.Quantized, float | None]) -> None:
        """Store what `pack` or `pack_plain_form` gave."""
        self.holder.take_quantized(*packed)

    def assign(self, array: np.ndarray) -> None:
        """Quantize `array`, of `shape`, and store it."""
        self.take(self.pack(array))

    def numpy(self) -> np.ndarray:
        """What the weight stands for, as a NumPy array of `shape`, with what an adapter adds."""
        return self.holder.adapted(self.holder.numpy())

    def plain_form(self) -> backend.Quantized:
        """The weight as files have it."""
        return self.holder.plain_form()


def _check_shape(array: np.ndarray, shape: tuple[int, ...], path: str) -> None:
    if tuple(array.shape) != shape:
        raise ValueError(
            f"{path} takes an array of shape {shape}. Received: array.shape={tuple(array.shape)}"
        )
