"""Uninitialized variables, for models whose weights are loaded next.

Keras defers initialization within a `StatelessScope` and initializes the variables later. Here
`assign` sets the values instead, so no random numbers are drawn and no zeros are written.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
from keras.src.backend.common import global_state

QUANTIZED = ("int8", "uint8", "int32")
"""Integer dtypes of weights."""

_PENDING = "uninitialized_variables"  # Keras's list of variables with deferred initialization


@contextlib.contextmanager
def uninitialized() -> Iterator[None]:
    """Context in which new weights allocate no memory. Other variables are initialized on exit."""
    before = list(global_state.get_global_attribute(_PENDING, []))
    try:
        with keras.StatelessScope(initialize_variables=False):
            yield
    finally:
        new = global_state.get_global_attribute(_PENDING, [])[len(before) :]
        global_state.set_global_attribute(_PENDING, before)
    for variable in new:
        is_weight = keras.backend.is_float_dtype(variable.dtype) or variable.dtype in QUANTIZED
        if not is_weight:  # the state of a random generator
            variable._deferred_initialize()


def assign(variable: keras.Variable, tensor: Any) -> None:
    """Assigns `tensor`, of the variable's dtype; also initializes an uninitialized variable."""
    if variable._value is None:
        variable._initialize(tensor)
        variable._initializer = None
    else:
        variable.assign(tensor)
