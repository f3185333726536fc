"""Base class of layers with one matrix `[out, in]`, in floating point or in 8 or 4 bits.

Creates, quantizes, saves and loads the variables of the matrix.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_gemma import backend
from keras_gemma.backend import keras_internals, quantized
from keras_gemma.lora.low_rank import LoraWeight, low_rank_product
from keras_gemma.model.layout_map import fold_axes
from keras_gemma.quantization import (
    AS_STORED,
    QuantizationConfig,
    dequantize_array,
    quantize_rows,
    relative_error,
    to_config,
)
from keras_gemma.quantization.array import INVALID_NUMBERS, MAX_ABS

INITIAL_DEVIATION = 0.02
"""Standard deviation of initial matrices, as in the published configurations."""


class Observed(NamedTuple):
    """Packed matrix that reports its inputs (used for calibration)."""

    packed: Any
    on_input: Callable[[Any], None]  # called with each input `[..., in]`


def matmul(x: Any, weight: Any) -> Any:
    """Multiplies `x [..., in]` by a packed matrix, plus its LoRA update -> `[..., out]`."""
    if isinstance(weight, Observed):
        weight.on_input(x)
        weight = weight.packed
    if isinstance(weight, LoraWeight):
        return backend.matmul(x, weight.packed) + low_rank_product(x, weight)
    return backend.matmul(x, weight)


class MatrixLayer(keras.layers.Layer):
    """Base class of layers with one matrix.

    A quantized layer has the frozen variables `values`, `scales` and, if the quantization has them,
    `zero_points` or `minimums`. In a new layer they are zero until they are loaded.
    """

    kind = "matrix"
    variable_name = "kernel"

    def __init__(self, quantization: Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.quantization: QuantizationConfig | None = to_config(quantization)
        self.relative_error: float | None = None

    def add_matrix(self, shape: tuple[int, int]) -> None:
        """Creates the variables of a matrix of this logical shape, in the backend's layout."""
        self.logical_shape = shape
        if self.quantization is not None:
            self._add_quantized()
            return
        variable = keras_internals.add_weight(
            self,
            functools.partial(fold_axes, self.name),
            name=self.variable_name,
            shape=backend.packed_shape(shape, self.kind),
            initializer=keras.initializers.RandomNormal(stddev=INITIAL_DEVIATION),
        )
        setattr(self, self.variable_name, variable)

    def _add_quantized(self) -> None:
        options = {"initializer": "zeros", "trainable": False, "autocast": False}
        for name, entry in self._spec(self.quantization)._asdict().items():
            variable = entry and self.add_weight(entry[0], dtype=entry[1], name=name, **options)
            setattr(self, name, variable)

    def _spec(self, config: QuantizationConfig) -> backend.Quantized:
        return backend.quantized_spec(self.logical_shape, self.kind, config.layout(self.kind))

    @property
    def layout(self) -> backend.Layout:
        """Layout of the quantized matrix."""
        return self.quantization.layout(self.kind)

    @property
    def variables_of_matrix(self) -> backend.Quantized | keras.Variable:
        """Plain variable, or variables of the quantized matrix."""
        if self.quantization is None:
            return getattr(self, self.variable_name)
        return backend.Quantized(self.values, self.scales, self.zero_points, self.minimums)

    @property
    def tensor(self) -> Any:
        """Packed matrix in the compute dtype, or quantized."""
        variables = self.variables_of_matrix
        if self.quantization is None:
            return ops.cast(variables.value, self.compute_dtype)
        return variables.map(lambda variable: variable.value)

    def adapted(self, matrix: np.ndarray) -> np.ndarray:
        """Returns `matrix` merged with its applied LoRA update: unchanged in this class."""
        return matrix

    def numpy(self) -> np.ndarray:
        """Returns the matrix, dequantized if necessary, in the dtype of plain variables."""
        if self.quantization is not None:
            return dequantize_array(self.plain_form(), np.dtype(self.variable_dtype))
        array = backend.to_numpy(self.variables_of_matrix.value)
        return backend.unpack(array, self.logical_shape)

    def plain_form(self) -> backend.Quantized:
        """Returns the quantized matrix in the plain form of files."""
        packed = self.variables_of_matrix.map(lambda v: ops.convert_to_numpy(v.value))
        return backend.quantized_unpack(packed, self.logical_shape, self.layout)

    def pack_quantized(
        self, array: np.ndarray, name: str, importance: np.ndarray | None = None
    ) -> tuple[backend.Quantized, float]:
        """Quantizes `array [out, in]` to the backend's layout; also returns its relative error."""
        if self.quantization.mode == AS_STORED:
            raise ValueError(
                f"{name} keeps the numbers of a GGUF file ({self.quantization.describe()}), and "
                "other numbers do not fit: load the model without `quantization='as_stored'` to "
                "assign weights."
            )
        layout = self.layout
        group_size = layout.group_size or array.shape[1]
        sums = np.zeros(2)

        def quantize(rows: slice) -> backend.Quantized:
            plain, sums_of_rows = quantize_rows(
                array[rows], layout.bits, group_size, layout.zero_points, importance
            )
            sums[:] += sums_of_rows
            return plain

        try:
            packed = backend.quantized_pack_rows(array.shape, self.kind, layout, quantize)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        return packed, relative_error(sums)

    def take_quantized(self, packed: backend.Quantized, error: float | None) -> None:
        """Assigns the result of `pack_quantized`, or of `backend.quantized_pack` for a file."""
        for variable, array in zip(self.variables_of_matrix, packed, strict=True):
            if variable is not None:
                backend.assign(variable, array)
        self.relative_error = error

    def check_quantizes(self, name: str, config: QuantizationConfig) -> None:
        """Raises a ValueError if `quantize_matrix` would. A model checks all matrices first."""
        self._spec(config)
        x = self.variables_of_matrix.value
        ends = (ops.convert_to_numpy(ops.cast(end, "float32")) for end in (ops.min(x), ops.max(x)))
        # XLA's minimum and maximum ignore NaN.
        if max(map(abs, ends)) > MAX_ABS or bool(ops.any(ops.isnan(x))):
            raise ValueError(f"{name}: {INVALID_NUMBERS}")

    def quantize_matrix(
        self, name: str, config: QuantizationConfig, importance: np.ndarray | None = None
    ) -> None:
        """Replaces the plain variable with quantized ones and frees its memory."""
        array = self.numpy()
        self.quantization = config
        packed, error = self.pack_quantized(array, name, importance)
        del array
        keras_internals.untrack(self, getattr(self, self.variable_name))
        setattr(self, self.variable_name, None)  # otherwise Keras runs the garbage collector
        delattr(self, self.variable_name)  # TensorFlow keeps variables that are only overwritten
        with keras_internals.adding_weights(self):
            self._add_quantized()
        self.take_quantized(packed, error)

    def save_own_variables(self, store: Any) -> None:
        if self.quantization is None:
            store["0"] = self.numpy()
            return
        for name, array in self.plain_form().by_file_name().items():
            store[name] = array

    def load_own_variables(self, store: Any) -> None:
        names = ("0", *quantized.FILE_NAMES)
        stored = {name: tuple(store[name].shape) for name in names if name in store}
        if self.quantization is None:
            # Another shape of the matrix raises when it is assigned.
            expected = {"0": stored.get("0", self.logical_shape)}
        else:
            spec = quantized.spec(self.logical_shape, self.kind, self.layout)
            shapes = {name: entry[0] for name, entry in spec.by_file_name().items()}
            expected = shapes | {"values": self.logical_shape}
        if stored != expected:
            form = self.quantization.describe() if self.quantization else "not quantized"
            raise ValueError(
                f"{self.path} is {form} and requires arrays of shapes {expected}; 0 is the matrix "
                "in floating point. Load weights from a model with the same quantization, or load "
                f"a preset or `.keras` file, which restore the quantization. Received: {stored}"
            )
        if self.quantization is None:
            variable = self.variables_of_matrix
            backend.assign(variable, backend.pack(np.array(store["0"]), self.kind, variable.dtype))
            return
        plain = backend.Quantized.from_file_names({name: np.array(store[name]) for name in stored})
        self.take_quantized(backend.quantized_pack(plain, self.kind, self.layout.bits), None)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        if self.quantization is not None:
            config["quantization"] = self.quantization.to_dict()
        return config
