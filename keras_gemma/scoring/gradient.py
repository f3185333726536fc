"""Gradient of a function on every backend, by way of one training step.

A model has a single weight, a shift of the input that is initially zero. It takes one step of
gradient descent with a learning rate of 1. The weight is then the negative gradient.
"""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops


class _Shifted(keras.Model):
    """Model that computes `function(x + shift)`, in float32."""

    def __init__(self, function: Callable[[Any], Any], shape: tuple[int, ...]) -> None:
        super().__init__(dtype="float32")
        self.function = function
        self.shift = self.add_weight(name="shift", shape=shape, initializer="zeros")
        self.built = True

    def call(self, x: Any) -> Any:
        return self.function(x + self.shift)


def gradient(function: Callable[[Any], Any], x: np.ndarray) -> np.ndarray:
    """Returns the gradient of `sum(function(x))` with respect to `x`.

    Args:
        function: Maps a float32 tensor of the shape of `x` to a tensor `[B]`. Other tensors that
            it uses must be constants, by `keras.ops.stop_gradient`.
        x: Input, float32, batch first.

    Returns:
        The gradient, float32, with the shape of `x`.
    """
    model = _Shifted(function, x.shape)
    model.compile(
        optimizer=keras.optimizers.SGD(1.0),
        loss=lambda _, y: ops.sum(y),
        run_eagerly=True,
        jit_compile=False,
    )
    model.train_on_batch(x, np.zeros(len(x), "float32"))
    return -ops.convert_to_numpy(model.shift)
