"""What the two models, with and without a head, share when they are quantized."""

from typing import Any

import keras

from keras_gemma.quantization import QuantizationConfig


class OwnQuantize:
    """A base of Keras models whose `quantize` has arguments of its own.

    Keras wraps that of each object to check for modes and settings that are its own.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        model = super().__new__(cls, *args, **kwargs)
        vars(model).pop("quantize", None)
        return model


def quantization_settings(
    mode: Any, group_size: int, zeros: bool, embedding: str
) -> QuantizationConfig:
    """The arguments of `quantize` as one."""
    if isinstance(mode, QuantizationConfig):
        return mode
    return QuantizationConfig(mode, group_size, zeros, embedding)


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
