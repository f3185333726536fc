"""A layer's one matrix `[out, in]`: a plain variable, or those of 8 or 4 bits.

Knows how the matrix gets its variables and how files see it, and no product with it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_gemma import backend
from keras_gemma.backend import keras_internals, quantized
from keras_gemma.lora.low_rank import LoraWeight, low_rank_product
from keras_gemma.model.initialization import initializer
from keras_gemma.quantization import (
    QuantizationConfig,
    dequantize_array,
    quantize_rows,
    relative_error,
    to_config,
)
from keras_gemma.quantization.array import LARGEST, NO_NUMBERS


class Observed(NamedTuple):
    """A packed matrix in the place of which somebody looks at what is multiplied with it."""

    packed: Any
    see: Callable[[Any], None]
    """Told the other factor, `[..., in]`."""


def matmul(x: Any, weight: Any) -> Any:
    """`x [..., in]` times a packed matrix, with what an adapter adds -> `[..., out]`."""
    if isinstance(weight, Observed):
        weight.see(x)
        weight = weight.packed
    if isinstance(weight, LoraWeight):
        return backend.matmul(x, weight.packed) + low_rank_product(x, weight)
    return backend.matmul(x, weight)


class MatrixLayer(keras.layers.Layer):
    """The base of layers with one matrix.

    Quantized, it has no plain variable but `values`, `scales` and, where it has zero points,
    `zeros`, which are not trained. Built so, they are zero until they are loaded.
    """

    kind = "matrix"
    variable_name = "kernel"

    def __init__(self, quantization: Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.quantization: QuantizationConfig | None = to_config(quantization)
        self.relative_error: float | None = None

    def add_matrix(self, shape: tuple[int, int]) -> None:
        """Make the variables of the matrix `shape`, in the layout of the backend."""
        self.logical_shape = shape
        if self.quantization is not None:
            self._add_quantized()
            return
        variable = self.add_weight(
            name=self.variable_name,
            shape=backend.packed_shape(shape, self.kind),
            initializer=initializer(),
        )
        setattr(self, self.variable_name, variable)

    def _add_quantized(self) -> None:
        for name, entry in self._spec(self.quantization)._asdict().items():
            variable = entry and self.add_weight(
                name=name,
                shape=entry[0],
                dtype=entry[1],
                initializer="zeros",
                trainable=False,
                autocast=False,
            )
            setattr(self, name, variable)

    def _spec(self, config: QuantizationConfig) -> backend.Quantized:
        """Shape and dtype of each quantized variable."""
        bits = config.bits(self.kind)
        if bits == 4:
            config.check_shapes({self.name: self.logical_shape})
        return backend.quantized_spec(
            self.logical_shape, self.kind, bits, config.group_size, bits == 4 and config.zeros
        )

    @property
    def variables_of_matrix(self) -> backend.Quantized | keras.Variable:
        """The plain variable, or those of the quantized matrix."""
        if self.quantization is None:
            return getattr(self, self.variable_name)
        return backend.Quantized(self.values, self.scales, self.zeros)

    @property
    def tensor(self) -> Any:
        """The packed matrix: in the compute dtype, or quantized."""
        variables = self.variables_of_matrix
        if self.quantization is None:
            return ops.cast(variables.value, self.compute_dtype)
        return backend.Quantized(*(v if v is None else v.value for v in variables))

    def adapted(self, matrix: np.ndarray) -> np.ndarray:
        """`matrix` with what an adapter adds to it: here, nothing."""
        return matrix

    def numpy(self) -> np.ndarray:
        """The matrix in the dtype that the layer keeps plain variables in."""
        if self.quantization is not None:
            return dequantize_array(self.plain_form(), np.dtype(self.variable_dtype))
        array = backend.to_numpy(self.variables_of_matrix.value)
        return backend.unpack(array, self.logical_shape)

    def plain_form(self) -> backend.Quantized:
        """The quantized matrix as files have it."""
        arrays = (
            None if variable is None else ops.convert_to_numpy(variable.value)
            for variable in self.variables_of_matrix
        )
        return backend.quantized_unpack(backend.Quantized(*arrays), self.logical_shape)

    def pack_quantized(
        self, array: np.ndarray, name: str, importance: np.ndarray | None = None
    ) -> tuple[backend.Quantized, float]:
        """A matrix quantized and in the layout of the backend, and its relative error.

        Args:
            array: `[out, in]`, floating point.
            name: of the matrix, for an error.
            importance: as of `quantize_array`.

        Raises:
            ValueError: numbers that are not finite.
        """
        config, bits = self.quantization, self.quantization.bits(self.kind)
        settings = bits, config.group_size, bits == 4 and config.zeros
        sums = np.zeros(2)

        def quantize(rows: slice) -> backend.Quantized:
            plain, of_these = quantize_rows(array[rows], *settings, importance)
            sums[:] += of_these
            return plain

        try:
            packed = backend.quantized_pack_rows(array.shape, self.kind, *settings, quantize)
        except ValueError as problem:
            raise ValueError(f"{name}: {problem}") from problem
        return packed, relative_error(sums)

    def take_quantized(self, packed: backend.Quantized, error: float | None) -> None:
        """Store what `pack_quantized` gave, or `backend.quantized_pack` of what a file had."""
        for variable, array in zip(self.variables_of_matrix, packed, strict=True):
            if variable is not None:
                backend.assign(variable, array)
        self.relative_error = error

    def check_quantizes(self, name: str, config: QuantizationConfig) -> None:
        """Raise a ValueError where `quantize_matrix` would; a model asks all its matrices first."""
        self._spec(config)
        x = self.variables_of_matrix.value
        ends = [ops.cast(end, "float32") for end in (ops.min(x), ops.max(x))]
        ends = [float(ops.convert_to_numpy(end)) for end in ends]
        # XLA's extremes pass NaN over.
        if max(map(abs, ends)) > LARGEST or bool(ops.any(ops.isnan(x))):
            raise ValueError(f"{name}: {NO_NUMBERS}")

    def quantize_matrix(
        self, name: str, config: QuantizationConfig, importance: np.ndarray | None = None
    ) -> None:
        """Replace the plain variable by quantized ones; its memory is free when this returns."""
        array = self.numpy()
        self.quantization = config
        packed, error = self.pack_quantized(array, name, importance)
        del array
        keras_internals.untrack(self, getattr(self, self.variable_name))
        setattr(self, self.variable_name, None)  # or Keras collects garbage, each time
        delattr(self, self.variable_name)  # TensorFlow keeps what is only written over
        with keras_internals.adding_weights(self):
            self._add_quantized()
        self.take_quantized(packed, error)

    def save_own_variables(self, store: Any) -> None:
        if self.quantization is None:
            store["0"] = self.numpy()
            return
        for name, array in self.plain_form()._asdict().items():
            if array is not None:
                store[name] = array

    def load_own_variables(self, store: Any) -> None:
        self._check_stored(store)
        if self.quantization is None:
            variable = self.variables_of_matrix
            backend.assign(variable, backend.pack(np.array(store["0"]), self.kind, variable.dtype))
            return
        names = backend.Quantized._fields
        plain = backend.Quantized(*(np.array(store[n]) if n in store else None for n in names))
        bits = self.quantization.bits(self.kind)
        self.take_quantized(backend.quantized_pack(plain, self.kind, bits), None)

    def _check_stored(self, store: Any) -> None:
        """Raise where `store` holds the matrix in other bits or groups than the layer."""
        names = ("0", *backend.Quantized._fields)
        stored = {name: tuple(store[name].shape) for name in names if name in store}
        if self.quantization is None:
            # Where the matrix has another shape, who assigns it says so.
            expected = {"0": stored.get("0", self.logical_shape)}
        else:
            config, bits = self.quantization, self.quantization.bits(self.kind)
            zeros = bits == 4 and config.zeros
            spec = quantized.spec(self.logical_shape, self.kind, bits, config.group_size, zeros)
            shapes = {name: entry[0] for name, entry in spec._asdict().items() if entry}
            expected = shapes | {"values": self.logical_shape}
        if stored != expected:
            how = self.quantization.describe() if self.quantization else "not quantized"
            raise ValueError(
                f"{self.path} is {how} and takes {expected}, where 0 is the matrix in floating "
                "point. Load weights that were saved from a model quantized in the same way, or a "
                f"preset or `.keras` file, which say how they are. Received: {stored}"
            )

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        if self.quantization is not None:
            config["quantization"] = self.quantization.to_dict()
        return config
