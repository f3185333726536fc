"""RMS normalization (Zhang and Sennrich, 2019, arXiv:1910.07467) with Gemma's `1 + scale`."""

from typing import Any

import keras
from keras import ops


def rms_normalize(x: Any, scale: Any, epsilon: float) -> Any:
    """Computes `x / rms(x) * (1 + scale)` in float32, then rounds to the dtype of `x [..., D]`."""
    dtype = keras.backend.standardize_dtype(x.dtype)
    x = ops.cast(x, "float32")
    mean_square = ops.mean(ops.square(x), axis=-1, keepdims=True)
    x = x * ops.rsqrt(mean_square + epsilon) * (1.0 + ops.cast(scale, "float32"))
    return ops.cast(x, dtype)


@keras.saving.register_keras_serializable(package="keras_gemma")
class RMSNormalization(keras.layers.Layer):
    """Layer with the scale `[D]` of one RMS norm, initially zero."""

    def __init__(self, epsilon: float = 1e-6, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.epsilon = epsilon

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        # Not rounded to the compute dtype, because 1 + scale is computed in float32.
        self.scale = self.add_weight(
            name="scale", shape=(input_shape[-1],), initializer="zeros", autocast=False
        )
        self.built = True

    @property
    def tensor(self) -> Any:
        """Scale in its stored dtype."""
        return self.scale.value

    def call(self, x: Any) -> Any:
        return rms_normalize(x, self.tensor, self.epsilon)

    def compute_output_spec(self, x: Any) -> keras.KerasTensor:
        return keras.KerasTensor(x.shape, dtype=self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "epsilon": self.epsilon}
