"""Texts and ids as users pass them: Python, NumPy or tensors of any framework.

Knows nothing about vocabularies and models.
"""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np


def read_texts(inputs: Any) -> tuple[list[str], bool]:
    """Returns the strings in `inputs`, and True if `inputs` is a batch."""
    if hasattr(inputs, "numpy"):
        inputs = inputs.numpy()
    if isinstance(inputs, np.ndarray):
        if inputs.ndim > 1:
            raise ValueError(
                "Text must be one string or a one-dimensional batch of strings. "
                f"Received: an array of shape {inputs.shape}"
            )
        inputs = inputs.tolist()
    if isinstance(inputs, list | tuple):
        return [as_str(text) for text in inputs], True
    return [as_str(inputs)], False


def pad_rows(
    rows: Sequence[Sequence[int]], length: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pads rows of at most `length` ids on the right. Returns ids, int32 `[B, length]`, and a mask
    that is True for ids of a row, bool `[B, length]`."""
    ids = np.full((len(rows), length), pad_id, "int32")
    mask = np.zeros((len(rows), length), "bool")
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = True
    return ids, mask


def to_numpy(x: Any) -> np.ndarray:
    """Returns a list, an array or a tensor of any framework as a NumPy array."""
    if hasattr(x, "to_list"):  # tf.RaggedTensor
        x = x.to_list()
    return keras.ops.convert_to_numpy(x) if keras.ops.is_tensor(x) else np.asarray(x)


def to_ids(name: str, x: Any, dimensions: int, vocabulary_size: int) -> np.ndarray:
    """Returns the argument `name`, ids in 1 or 2 `dimensions`, as an int32 array."""
    try:
        array = to_numpy(x)
    except ValueError as error:
        raise ValueError(
            f"`{name}` must have rows of one length. Pad them, and pass a padding mask. "
            f"Received: {x!r:.200}"
        ) from error
    if array.ndim != dimensions or (array.size and array.dtype.kind not in "iu"):
        shape = "[tokens]" if dimensions == 1 else "[batch, tokens]"
        raise ValueError(
            f"`{name}` must be integer ids of shape {shape}. Received: shape {array.shape}, dtype "
            f"{array.dtype}, {x!r:.200}"
        )
    if array.size and (array.min() < 0 or array.max() >= vocabulary_size):
        raise ValueError(
            f"`{name}` must be in [0, {vocabulary_size - 1}]. Received: ids from {array.min()} to "
            f"{array.max()}"
        )
    return array.astype("int32")


def as_str(text: Any) -> str:
    """Returns one text, which may be bytes or a string tensor, as a string."""
    if hasattr(text, "numpy"):
        text = text.numpy()
    if not isinstance(text, str | bytes):
        raise TypeError(
            "Text must be a string, or a list or array of strings. "
            f"Received: {text!r} of type {type(text).__name__}"
        )
    try:
        if isinstance(text, bytes):
            return text.decode("utf-8")
        text.encode("utf-8")
    except UnicodeError as error:
        raise ValueError(
            "Text must be valid Unicode. Decode it with its encoding, or replace invalid bytes "
            f"with `errors='replace'`. Received: {text!r:.80}"
        ) from error
    return str(text)


def read_ids(inputs: Any) -> tuple[list[np.ndarray], bool]:
    """Returns the rows of ids in `inputs`, integers `[T]` each, and True if `inputs` is a batch."""
    if hasattr(inputs, "to_list"):  # tf.RaggedTensor
        inputs = inputs.to_list()
    if isinstance(inputs, list | tuple):
        batched = not all(isinstance(i, int) or getattr(i, "ndim", None) == 0 for i in inputs)
        rows = [to_numpy(row) for row in inputs]
        rows = rows if batched else [np.array(rows)]
    else:
        array = to_numpy(inputs)
        batched = array.ndim > 1
        rows = list(array) if batched else [array.reshape(-1)]
    for row in rows:
        if row.size and row.dtype.kind not in "iu":
            raise TypeError(f"`inputs` must be integer ids. Received: {row!r:.200}")
        if row.ndim != 1:
            raise ValueError(
                "`inputs` must be ids in one or two dimensions. "
                f"Received: an array of shape {row.shape} for one sequence"
            )
    return rows, batched
