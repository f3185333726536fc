"""Base class of `GemmaBackbone` and `GemmaCausalLM`: their state in training.

Weights change their dtype when a model is quantized, and adapters come and go. Keras keeps compiled
functions and optimizer slots for the variables that it saw first. This file keeps both up to date.
"""

import io
import shutil
from typing import Any

import keras
import numpy as np
from keras import ops
from rich.console import Console
from rich.table import Column, Table

from keras_gemma.backend import keras_internals

SUMMARY_POSITIONS = (0.28, 0.53, 0.78, 1.0)
"""Ends of the columns of a summary: wide enough for 27 billion parameters in 80 columns."""
SUMMARY_WIDTH = 108
"""Maximum width of a summary, in columns. It is Keras's for such models."""


class TrainableModel(keras.Model):
    """Keras model that is a Gemma backbone, or has one as its `backbone`."""

    _in_fit = False
    """True if `fit` is running."""

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Same as `keras.Model.__call__`. A dict may mix tensors, NumPy arrays and lists."""
        if isinstance(inputs, dict):
            inputs = {
                name: ops.convert_to_tensor(x, "int32") if isinstance(x, np.ndarray | list) else x
                for name, x in inputs.items()
            }
        return super().__call__(inputs, *args, **kwargs)

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """Same as `keras.Model.fit`, but checks first that the model is trainable."""
        check_trainable(self)
        self._in_fit = True
        try:
            return super().fit(*args, **kwargs)
        finally:
            self._in_fit = False

    def train_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Same as `keras.Model.train_on_batch`, but checks first that the model is trainable."""
        check_trainable(self)
        return super().train_on_batch(*args, **kwargs)

    def make_train_function(self, force: bool = False) -> Any:
        """Same as `keras.Model.make_train_function`, with an optimizer of the current variables."""
        built = keras_internals.optimizer_variables(self.optimizer)
        trainable = self.trainable_variables
        if built and list(map(id, built)) != list(map(id, trainable)):
            keras_internals.reset_optimizer(self.optimizer)
            self.optimizer.build(trainable)
        return super().make_train_function(force)

    def summary(
        self,
        line_length: int | None = None,
        positions: Any = None,
        print_fn: Any = None,
        **kwargs: Any,
    ) -> None:
        """Prints the Keras summary, after the preprocessor and before the weights' dtype."""
        show = print_fn or print
        preprocessor = getattr(self, "preprocessor", None)
        if preprocessor is not None:
            show(_describe_preprocessor(preprocessor, line_length))
        super().summary(line_length, positions or SUMMARY_POSITIONS, print_fn, **kwargs)
        backbone = _backbone(self)
        quantization = backbone.quantization
        weights = (
            f" Weights: {backbone.variable_dtype}, computing in {backbone.compute_dtype}; "
            f"{quantization.describe() if quantization else 'not quantized'}"
        )
        show("\n".join(filter(None, (weights, backbone.adapters.describe()))))


def _describe_preprocessor(preprocessor: Any, line_length: int | None) -> str:
    """Returns a table of the preprocessor's tokenizer, as KerasHub has it above the layers."""
    tokenizer = preprocessor.tokenizer
    width = line_length or min(SUMMARY_WIDTH, shutil.get_terminal_size().columns - 4)
    table = Table("Layer (type)", Column("Config", justify="right"), width=width, show_lines=True)
    table.add_row(
        f"{tokenizer.name} ({type(tokenizer).__name__})",
        f"Vocab size: {tokenizer.vocabulary_size():,}",
    )
    text = io.StringIO()
    console = Console(file=text, width=width)
    console.print(f'Preprocessor: "{preprocessor.name}"', style="bold", highlight=False)
    console.print(table, markup=False, highlight=False)
    return text.getvalue().rstrip("\n")


def _backbone(model: Any) -> Any:
    return getattr(model, "backbone", model)


def check_trainable(model: Any) -> None:
    """Raises a ValueError if no variable of `model` can be trained."""
    backbone = _backbone(model)
    backbone.adapters.check_trainable()
    quantization = backbone.quantization
    if quantization is not None and not model.trainable_variables:
        raise ValueError(
            f"Nothing of this model can be trained: its weights are {quantization.describe()}. "
            "Train in floating point, and quantize afterwards; or call `enable_lora()`, whose "
            "adapters are trainable."
        )


def check_not_in_fit(backbone: Any, verb: str) -> None:
    """Raises a ValueError if `backbone`, or a model that wraps it, is being trained."""
    if any(model._in_fit for model in (backbone, *backbone.wrapping_models)):
        raise ValueError(f"The model is being trained: {verb} when `fit` has returned.")


def release_variables(backbone: Any) -> None:
    """Drops references to the variables of `backbone` that keep replaced ones in memory."""
    for model in (backbone, *backbone.wrapping_models):
        keras_internals.release_torch_parameters(model)


def reset_training(backbone: Any) -> None:
    """Makes Keras compile `fit`, `evaluate` and `predict` again for the current variables.

    Resets optimizers with slots for variables that are neither trainable nor in an adapter.
    """
    adapters = backbone.adapters.variables()
    for model in (backbone, *backbone.wrapping_models):
        model.train_function = model.test_function = model.predict_function = None
        optimizer = getattr(model, "optimizer", None)
        trainable = {id(variable) for variable in (*model.trainable_variables, *adapters)}
        variables = keras_internals.optimizer_variables(optimizer)
        if any(id(variable) not in trainable for variable in variables):
            keras_internals.reset_optimizer(optimizer)
