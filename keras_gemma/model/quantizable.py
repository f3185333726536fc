"""What the two models, with and without a head, share: `quantize`, and what follows from it."""

from collections.abc import Mapping
from typing import Any

import keras

from keras_gemma.quantization import QuantizationConfig, to_config


class Quantizable:
    """A base of Keras models with a `quantize` of their own; they say how in `_quantize`."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        model = super().__new__(cls, *args, **kwargs)
        # Keras wraps that of each object to check for modes and settings that are Keras's own.
        vars(model).pop("quantize", None)
        return model

    def quantize(
        self,
        mode: Any,
        group_size: int = 32,
        zeros: bool = False,
        embedding: str = "int8",
        *,
        calibration: Any = None,
    ) -> None:
        """Put the matrices into 8 or 4 bits, one after the other: no second model is in memory.

        Generation, scores and saved presets go on with these weights; neither they nor norms are
        trained afterwards. `from_preset(..., quantization=...)` does it while it loads.

        Args:
            mode: `"int8"`, with a scale a row; `"int4"`; or a `QuantizationConfig`, or its
                dictionary, with all the rest.
            group_size: of `"int4"`: how many numbers of a row share a scale.
            zeros: of `"int4"`: whether each group has a zero point too.
            embedding: of `"int4"`: bits of the embedding.
            calibration: a few texts, or lists of ids, as the model will read: what they are
                multiplied with decides where a matrix has to be most precise. A backbone reads
                ids alone.

        Raises:
            ValueError: the model is quantized already, an unknown mode, rows that the groups do
                not fill, or strings without a preprocessor.

        Example:

        ```python
        import keras_gemma

        lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
        lm.quantize("int4", calibration=["Before we proceed any further, hear me speak."])
        print(keras_gemma.quantization.report(lm))
        ```
        """
        if isinstance(mode, QuantizationConfig | Mapping):
            config = to_config(mode)
        else:
            config = QuantizationConfig(mode, group_size, zeros, embedding)
        self._quantize(config, calibration)

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """`keras.Model.fit`, where there is something to train."""
        self._check_trainable()
        return super().fit(*args, **kwargs)

    def train_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        """`keras.Model.train_on_batch`, where there is something to train."""
        self._check_trainable()
        return super().train_on_batch(*args, **kwargs)

    def _check_trainable(self) -> None:
        quantization = getattr(self, "backbone", self).quantization
        if quantization is not None and not self.trainable_variables:
            raise ValueError(
                f"Nothing of this model can be trained: its weights are {quantization.describe()}. "
                "Train in floating point, and quantize afterwards."
            )

    def summary(self, *args: Any, print_fn: Any = None, **kwargs: Any) -> None:
        """`keras.Model.summary`, and a line on the weights' dtype, quantization and bytes."""
        super().summary(*args, print_fn=print_fn, **kwargs)
        (print_fn or print)(describe_weights(getattr(self, "backbone", self)))


def let_go(model: keras.Model) -> None:
    """Give up what PyTorch's modules hold of the variables of `model`, so that one that is replaced
    is freed at once. Keras collects them again when they are next asked for."""
    for layer in model._flatten_layers():
        if hasattr(layer, "_torch_params"):
            del layer._torch_params


def forget_programs(model: keras.Model) -> None:
    """Let Keras compile `fit`, `evaluate` and `predict` anew, on the weights as they are."""
    model.train_function = model.test_function = model.predict_function = None


def describe_weights(backbone: Any) -> str:
    """A line on dtype, quantization and memory of the weights of a `GemmaBackbone`."""
    quantization = backbone.quantization
    size = sum(weight.bytes for weight in backbone.named_weights().values())
    return (
        f" Weights: {backbone.variable_dtype}, computing in {backbone.compute_dtype}; "
        f"{quantization.describe() if quantization else 'not quantized'}; {size / 1e6:,.1f} MB"
    )
