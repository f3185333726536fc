"""The gradient of a function, on every backend, by what all of them have: a step of training.

A model whose one weight is a shift of the input, zero, takes a step of plain gradient descent at
rate 1. Then the weight is the gradient, turned around.
"""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops


class _Shifted(keras.Model):
    """`function(x + shift)`, in float32."""

    def __init__(self, function: Callable[[Any], Any], shape: tuple[int, ...]) -> None:
        super().__init__(dtype="float32")
        self.function = function
        self.shift = self.add_weight(name="shift", shape=shape, initializer="zeros")
        self.built = True

    def call(self, x: Any) -> Any:
        return self.function(x + self.shift)


def gradient(function: Callable[[Any], Any], x: np.ndarray) -> np.ndarray:
    """The gradient of `sum(function(x))` with respect to `x`.

    Args:
        function: from a float32 tensor of the shape of `x` to one `[B]`. Tensors that it takes
            from elsewhere must let no gradient pass, by `keras.ops.stop_gradient`.
        x: float32, batch first.

    Returns:
        float32, of the shape of `x`.
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
