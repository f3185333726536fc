"""Support of `tf.data` pipelines for NumPy functions.

TensorFlow is never imported, only looked up in `sys.modules`: a caller with a `tf.data.Dataset` or
a symbolic tensor has already imported it.
"""

import sys
from collections.abc import Callable
from typing import Any

import keras
import numpy as np


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
        x: A symbolic tensor of any shape [...], or a structure of such tensors.
        signature: A structure of `keras.KerasTensor`: dtypes, and the shapes after [...].

    Returns:
        Symbolic tensors in the structure of `signature`, with static shapes [..., *shape].
    """
    tf = sys.modules["tensorflow"]
    leaves, inputs = keras.tree.flatten(signature), keras.tree.flatten(x)

    def of_arrays(*arrays: Any) -> list[Any]:
        return keras.tree.flatten(function(keras.tree.pack_sequence_as(x, arrays)))

    outputs = tf.numpy_function(of_arrays, inputs, [leaf.dtype for leaf in leaves])
    for output, leaf in zip(outputs, leaves, strict=True):
        output.set_shape(inputs[0].shape.concatenate(leaf.shape))
    return keras.tree.pack_sequence_as(signature, outputs)


def map_ragged(function: Callable[[Any], Any], x: Any, dtype: str) -> Any:
    """Applies a function from B values to B arrays of different lengths in a `tf.data` pipeline.

    Args:
        function: Function from the NumPy value of `x` to a list of arrays.
        x: A symbolic tensor `[B]`.
        dtype: Dtype of the arrays.

    Returns:
        A `tf.RaggedTensor` `[B, None]`.
    """
    tf = sys.modules["tensorflow"]

    def flat(value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = function(value)
        values = np.concatenate([np.zeros(0, dtype), *rows]).astype(dtype)
        return values, np.array([len(row) for row in rows], "int64")

    values, lengths = tf.numpy_function(flat, [x], [dtype, "int64"])
    values.set_shape([None])
    lengths.set_shape(x.shape)
    return tf.RaggedTensor.from_row_lengths(values, lengths, validate=False)


def map_strings(function: Callable[[Any], Any], dataset: Any) -> Any:
    """Maps `function` over a dataset of strings or of dicts of strings; returns other datasets
    unchanged."""
    tf = sys.modules["tensorflow"]
    spec = dataset.element_spec
    if isinstance(spec, tuple) and len(spec) == 1:
        (spec,) = spec
        dataset = dataset.map(lambda x: x)
    leaves = list(spec.values()) if isinstance(spec, dict) else [spec]
    if not all(isinstance(leaf, tf.TensorSpec) and leaf.dtype == tf.string for leaf in leaves):
        return dataset
    return dataset.map(function, num_parallel_calls=tf.data.AUTOTUNE)
