"""What a weight holds before it is trained or loaded."""

import keras

STANDARD_DEVIATION = 0.02
"""Of the normal distribution that matrices start from, as in the published configurations."""


def initializer() -> keras.Initializer:
    """The initializer of a matrix."""
    return keras.initializers.RandomNormal(stddev=STANDARD_DEVIATION)
