"""A matrix without bias, stored as its backend reads it fastest."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_gemma import backend
from keras_gemma.model.initialization import initializer


@keras.saving.register_keras_serializable(package="keras_gemma")
class Linear(keras.layers.Layer):
    """Holds one matrix `[out, in]`; `matmul(x [..., in])` -> `[..., out]`.

    The variable has the backend's layout; files and `NamedWeight` see `[out, in]`.
    """

    def __init__(self, out_dim: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.out_dim = out_dim

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.logical_shape = (self.out_dim, input_shape[-1])
        self.kernel = self.add_weight(
            name="kernel",
            shape=backend.packed_shape(self.logical_shape, "matrix"),
            initializer=initializer(),
        )
        self.built = True

    @property
    def tensor(self) -> Any:
        """The packed weight in the compute dtype."""
        return ops.cast(self.kernel.value, self.compute_dtype)

    def call(self, x: Any) -> Any:
        return backend.matmul(x, self.tensor)

    def compute_output_spec(self, x: Any) -> keras.KerasTensor:
        return keras.KerasTensor((*x.shape[:-1], self.out_dim), dtype=self.compute_dtype)

    def save_own_variables(self, store: Any) -> None:
        store["0"] = backend.unpack(ops.convert_to_numpy(self.kernel), self.logical_shape)

    def load_own_variables(self, store: Any) -> None:
        weight = np.array(store["0"])
        backend.assign(self.kernel, backend.pack(weight, "matrix", self.kernel.dtype))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "out_dim": self.out_dim}
