"""`tf.data` pipelines, for functions that are written in numpy.

TensorFlow is looked up among the modules already loaded and never imported: whoever hands over a
`tf.data.Dataset` or a symbolic tensor has imported it, and nobody else has to.
"""

import sys
from collections.abc import Callable
from typing import Any

import keras


def is_symbolic(x: Any) -> bool:
    """Whether `x` is a tensor without a value, as `Dataset.map` hands to its function."""
    tf = sys.modules.get("tensorflow")
    return tf is not None and tf.is_symbolic_tensor(x)


def is_dataset(x: Any) -> bool:
    """Whether `x` is a `tf.data.Dataset`."""
    tf = sys.modules.get("tensorflow")
    return tf is not None and isinstance(x, tf.data.Dataset)


def map_numpy(function: Callable[[Any], Any], x: Any, signature: Any) -> Any:
    """`function` as one step of a `tf.data` pipeline.

    Args:
        function: takes the numpy value of `x`, returns arrays in the structure of `signature`.
        x: a symbolic tensor of any shape [...].
        signature: a structure of `keras.KerasTensor`: dtypes, and the shapes that follow [...].

    Returns:
        symbolic tensors in the structure of `signature`, with static shapes [..., *shape].
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
    """`dataset` with `function` applied to its elements, if they are strings; else as it is."""
    tf = sys.modules["tensorflow"]
    spec = dataset.element_spec
    if isinstance(spec, tuple) and len(spec) == 1:
        (spec,) = spec
        dataset = dataset.map(lambda x: x)
    if not isinstance(spec, tf.TensorSpec) or spec.dtype != tf.string:
        return dataset
    return dataset.map(function, num_parallel_calls=tf.data.AUTOTUNE)
