"""Access to attributes of Keras that have no public name. No other file of the package uses any."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import keras
from keras.src.backend.common import global_state

QUANTIZED = ("int8", "uint8", "int32")
"""Integer dtypes of weights."""

_PENDING = "uninitialized_variables"  # Keras's list of variables with deferred initialization


@contextmanager
def uninitialized() -> Iterator[None]:
    """Context in which new weights allocate no memory, for models whose weights are loaded next.

    Keras defers initialization within a `StatelessScope`, and initializes the variables later. Here
    `assign` sets the values instead, so no random numbers are drawn and no zeros are written.
    Variables that are not weights are initialized on exit.
    """
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


class _FoldedLayouts:
    """Distribution of new variables whose layouts pass through `fold`."""

    def __init__(self, distribution: Any, fold: Callable[..., tuple[str | None, ...]]) -> None:
        self.distribution, self.fold = distribution, fold

    def get_variable_layout(self, variable: keras.Variable) -> Any:
        layout = self.distribution.get_variable_layout(variable)
        if not any(layout.axes):
            return layout
        axes = self.fold(layout.axes, len(variable.shape))
        return keras.distribution.TensorLayout(axes, layout.device_mesh)


def add_weight(
    layer: keras.layers.Layer, fold: Callable[..., tuple[str | None, ...]], **options: Any
) -> keras.Variable:
    """Adds a weight whose layout on several devices is `fold(axes, rank)` of the layout map's."""
    distribution = keras.distribution.distribution()
    if not isinstance(distribution, keras.distribution.ModelParallel):
        return layer.add_weight(**options)
    folded = _FoldedLayouts(distribution, fold)
    keras.distribution.set_distribution(folded)
    try:
        variable = layer.add_weight(**options)
    finally:
        keras.distribution.set_distribution(distribution)
    if getattr(variable, "_layout", None) is None:  # its initialization is deferred
        variable._layout = folded.get_variable_layout(variable)
    return variable


def assign(variable: keras.Variable, tensor: Any) -> None:
    """Assigns `tensor`, of the variable's dtype; also initializes an uninitialized variable."""
    if variable._value is None:
        variable._initialize(tensor)
        variable._initializer = None
    else:
        variable.assign(tensor)


@contextmanager
def adding_weights(layer: keras.layers.Layer) -> Iterator[None]:
    """Allows new variables in a layer that is built already."""
    layer._tracker.unlock()
    try:
        yield
    finally:
        layer._tracker.lock()


def untrack(layer: keras.layers.Layer, variable: keras.Variable) -> None:
    layer._untrack_variable(variable)


def sublayers(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    return list(layer._flatten_layers(include_self=False, recursive=False))


def release_torch_parameters(model: keras.Model) -> None:
    """Frees replaced variables: drops PyTorch's references, which Keras collects when needed."""
    for layer in model._flatten_layers():
        if hasattr(layer, "_torch_params"):
            del layer._torch_params


def restore_quantize(model: keras.Model) -> None:
    """Restores the class's `quantize`. Keras wraps it in each object, to validate its own modes."""
    vars(model).pop("quantize", None)


def compile_metrics(model: keras.Model) -> Any:
    """Returns the container of the metrics passed to `compile`, or `None`."""
    return model._compile_metrics


def optimizer_variables(optimizer: keras.Optimizer | None) -> list[keras.Variable]:
    """Returns the trainable variables that an optimizer was built for."""
    if optimizer is None or not optimizer.built:
        return []
    return optimizer._trainable_variables


def reset_optimizer(optimizer: keras.Optimizer) -> None:
    """Frees the slot variables. In place, because Keras and user code may hold the optimizer."""
    for part in (optimizer, getattr(optimizer, "inner_optimizer", None)):
        if part is not None:
            fresh = type(part).from_config(part.get_config())
            vars(part).clear()
            vars(part).update(vars(fresh))
