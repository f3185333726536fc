"""A matrix without bias, stored as its backend reads it fastest."""

from typing import Any

import keras

from keras_gemma.model.matrix import MatrixLayer, matmul


@keras.saving.register_keras_serializable(package="keras_gemma")
class Linear(MatrixLayer):
    """Holds one matrix `[out, in]`; `matmul(x [..., in])` -> `[..., out]`.

    The variable has the backend's layout; files and `NamedWeight` see `[out, in]`.
    """

    def __init__(self, out_dim: int, quantization: Any = None, **kwargs: Any) -> None:
        super().__init__(quantization, **kwargs)
        self.out_dim = out_dim

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.add_matrix((self.out_dim, input_shape[-1]))
        self.built = True

    def call(self, x: Any) -> Any:
        return matmul(x, self.tensor)

    def compute_output_spec(self, x: Any) -> keras.KerasTensor:
        return keras.KerasTensor((*x.shape[:-1], self.out_dim), dtype=self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "out_dim": self.out_dim}
