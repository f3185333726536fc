"""Variables without a value, for models whose weights are about to be loaded.

Keras defers initialisation within a `StatelessScope` and makes the values up later; these are
given theirs by `assign`, so that no random number is drawn and no zero is written.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
from keras.src.backend.common import global_state

QUANTIZED = ("int8", "uint8", "int32")
"""Integers that are weights too."""

_PENDING = "uninitialized_variables"  # Keras's list of what it is to initialise later


@contextlib.contextmanager
def uninitialized() -> Iterator[None]:
    """Within it, new variables take no memory; all but weights get their value at its end."""
    before = list(global_state.get_global_attribute(_PENDING, []))
    try:
        with keras.StatelessScope(initialize_variables=False):
            yield
    finally:
        made = global_state.get_global_attribute(_PENDING, [])[len(before) :]
        global_state.set_global_attribute(_PENDING, before)
    for variable in made:
        weight = keras.backend.is_float_dtype(variable.dtype) or variable.dtype in QUANTIZED
        if not weight:  # the state of a random generator
            variable._deferred_initialize()


def assign(variable: keras.Variable, tensor: Any) -> None:
    """Give `variable` the value `tensor`, of its dtype: its first value or another."""
    if variable._value is None:
        variable._initialize(tensor)
        variable._initializer = None
    else:
        variable.assign(tensor)
