"""The tied embedding: ids to vectors on the way in; on the way out, the head's matrix."""

from typing import Any

import keras
import ml_dtypes
import numpy as np
from keras import ops

from keras_gemma import backend
from keras_gemma.model.head import to_logits
from keras_gemma.model.matrix import MatrixLayer


def scale_embeddings(x: Any, scale: float) -> Any:
    """`x * scale`, with the scale rounded to the dtype of `x` first, as the models were trained.

    In bfloat16 a hidden size of 3072 multiplies by 55.5, not by 55.43.
    """
    dtype = keras.backend.standardize_dtype(x.dtype)
    if dtype in ("bfloat16", "float16"):
        scale = float(np.asarray(scale).astype(getattr(ml_dtypes, dtype, dtype)))
    return x * scale


@keras.saving.register_keras_serializable(package="keras_gemma")
class ReversibleEmbedding(MatrixLayer):
    """Holds the embedding `[V, D]`.

    Calling it with ids `[B, T]` gives their vectors `[B, T, D]`, not yet scaled; with
    `reverse=True` and hidden states `[B, T, D]` it gives capped logits, float32 `[B, T, V]`.
    """

    kind = "embedding"
    variable_name = "embeddings"

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        logit_soft_cap: float | None = None,
        quantization: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(quantization, **kwargs)
        self.input_dim = input_dim
        self.output_dim = output_dim
        self.logit_soft_cap = logit_soft_cap

    def build(self, input_shape: tuple[int | None, ...] | None = None) -> None:
        self.add_matrix((self.input_dim, self.output_dim))
        self.built = True

    def call(self, inputs: Any, reverse: bool = False) -> Any:
        if reverse:
            return to_logits(inputs, self.tensor, self.logit_soft_cap)
        return backend.embed(ops.cast(inputs, "int32"), self.tensor, self.compute_dtype)

    def compute_output_spec(self, inputs: Any, reverse: bool = False) -> keras.KerasTensor:
        if reverse:
            return keras.KerasTensor((*inputs.shape[:-1], self.input_dim), dtype="float32")
        return keras.KerasTensor((*inputs.shape, self.output_dim), dtype=self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "input_dim": self.input_dim,
            "output_dim": self.output_dim,
            "logit_soft_cap": self.logit_soft_cap,
        }
