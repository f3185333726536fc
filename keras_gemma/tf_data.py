"""Support of `tf.data` pipelines for NumPy functions.

TensorFlow is never imported, only looked up in `sys.modules`: a caller with a `tf.data.Dataset` or
a symbolic tensor has already imported it.
"""

import sys
from collections.abc import Callable
from typing import Any

import keras


def is_symbolic(x: Any) -> bool:
    """Returns True if `x` is a symbolic tensor, as in a function passed to `Dataset.map`."""
    tf = sys.modules.get("tensorflow")
    return tf is not None and tf.is_symbolic_tensor(x)


def is_dataset(x: Any) -> bool:
    """Returns True if `x` is a `tf.data.Dataset`."""
    tf = sys.modules.get("tensorflow")
    return tf is not None and isinstance(x, tf.data.Dataset)


def map_numpy(function: Callable[[Any], Any], x: Any, signature: Any) -> Any:
    """Applies a NumPy function as a step of a `tf.data` pipeline.

    Args:
        function: Function from the NumPy value of `x` to arrays in the structure of `signature`.
        x: A symbolic tensor of any shape [...].
        signature: A structure of `keras.KerasTensor`: dtypes, and the shapes after [...].

    Returns:
        Symbolic tensors in the structure of `signature`, with static shapes [..., *shape].
    """
    tf = sys.modules["tensorflow"]
    leaves = keras.tree.flatten(signature)
    outputs = tf.numpy_function(
        lambda value: keras.tree.flatten(function(value)), [x], [leaf.dtype for leaf in leaves]
    )
    for output, leaf in zip(outputs, leaves, strict=True):
        output.set_shape(x.shape.concatenate(leaf.shape))
    return keras.tree.pack_sequence_as(signature, outputs)


def map_strings(function: Callable[[Any], Any], dataset: Any) -> Any:
    """Maps `function` over a dataset of strings; returns other datasets unchanged."""
    tf = sys.modules["tensorflow"]
    spec = dataset.element_spec
    if isinstance(spec, tuple) and len(spec) == 1:
        (spec,) = spec
        dataset = dataset.map(lambda x: x)
    if not isinstance(spec, tf.TensorSpec) or spec.dtype != tf.string:
        return dataset
    return dataset.map(function, num_parallel_calls=tf.data.AUTOTUNE)
