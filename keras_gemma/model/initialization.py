"""Initial values of matrices."""

import keras

STANDARD_DEVIATION = 0.02
"""Standard deviation of initial matrices, as in the published configurations."""


def initializer() -> keras.Initializer:
    return keras.initializers.RandomNormal(stddev=STANDARD_DEVIATION)
