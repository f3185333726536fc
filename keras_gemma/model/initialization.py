"""What a weight holds before it is trained or loaded."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import keras

_skipped: ContextVar[bool] = ContextVar("initialization_skipped", default=False)

STANDARD_DEVIATION = 0.02
"""Of the normal distribution that matrices start from, as in the published configurations."""


@contextlib.contextmanager
def uninitialized() -> Iterator[None]:
    """Within it, new weights are zeros: for models whose weights are about to be loaded."""
    token = _skipped.set(True)
    try:
        yield
    finally:
        _skipped.reset(token)


def initializer() -> keras.Initializer:
    """The initializer of a matrix made now."""
    if _skipped.get():
        return keras.initializers.Zeros()
    return keras.initializers.RandomNormal(stddev=STANDARD_DEVIATION)
