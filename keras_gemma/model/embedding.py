"""Tied embedding: converts token ids to vectors, and is the matrix of the output head."""

from typing import Any

import keras
import ml_dtypes
import numpy as np
from keras import ops

from keras_gemma import backend
from keras_gemma.model.head import to_logits
from keras_gemma.model.matrix import MatrixLayer


def scale_embeddings(x: Any, scale: float) -> Any:
    """Returns `x * scale`, with the scale rounded to the dtype of `x` first, as in training.

    For a hidden size of 3072, the bfloat16 factor is 55.5 instead of 55.43.
    """
    dtype = keras.backend.standardize_dtype(x.dtype)
    if dtype in ("bfloat16", "float16"):
        scale = float(np.asarray(scale).astype(getattr(ml_dtypes, dtype, dtype)))
    return x * scale


@keras.saving.register_keras_serializable(package="keras_gemma")
class ReversibleEmbedding(MatrixLayer):
    """Layer with the embedding `[V, D]`.

    Converts ids `[B, T]` to unscaled vectors `[B, T, D]`. With `reverse=True`, converts hidden
    states `[B, T, D]` to capped float32 logits `[B, T, V]`.
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
