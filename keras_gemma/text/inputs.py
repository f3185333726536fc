"""What people hand over as texts or ids: Python, NumPy or a tensor of any framework.

Knows no vocabulary and no model.
"""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np


def read_texts(inputs: Any) -> tuple[list[str], bool]:
    """The strings in `inputs`, and whether they were many.

    Raises TypeError for anything but strings, ValueError for arrays of two or more dimensions.
    """
    if isinstance(inputs, str | bytes):
        return [as_str(inputs)], False
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
    """Rows of at most `length` ids, padded on the right.

    Returns int32 ids [B, length] and a bool mask [B, length], True where a row has an id.
    """
    ids = np.full((len(rows), length), pad_id, "int32")
    mask = np.zeros((len(rows), length), "bool")
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = True
    return ids, mask


def to_numpy(x: Any) -> np.ndarray:
    """`x`, a list, an array or a tensor of any framework, as an array on the host.

    Raises ValueError where rows have different lengths.
    """
    if hasattr(x, "to_list"):  # tf.RaggedTensor
        x = x.to_list()
    return keras.ops.convert_to_numpy(x) if keras.ops.is_tensor(x) else np.asarray(x)


def to_ids(name: str, x: Any, dimensions: int, vocabulary_size: int) -> np.ndarray:
    """`x` as int32 ids of a vocabulary, in so many dimensions.

    Raises ValueError, which calls `x` by `name`, where it is anything else.
    """
    try:
        array = to_numpy(x)
    except ValueError as error:
        raise ValueError(
            f"`{name}` must have rows of one length. Pad them, and say where in the padding mask. "
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
    """One `text` as a string that UTF-8 can write; else TypeError or ValueError."""
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
            "Text must be valid Unicode: decode it with its own encoding, or replace what is "
            f"broken with `errors='replace'`. Received: {text!r}"
        ) from error
    return str(text)


def read_ids(inputs: Any) -> tuple[list[np.ndarray], bool]:
    """The rows of ids in `inputs`, integers [T] each, and whether they were many.

    Raises TypeError for anything but integers, ValueError for three or more dimensions.
    """
    if hasattr(inputs, "to_list"):  # tf.RaggedTensor
        inputs = inputs.to_list()
    if isinstance(inputs, list | tuple):
        scalars = all(isinstance(i, int) or getattr(i, "ndim", None) == 0 for i in inputs)
        rows = [to_numpy(row) for row in inputs]
        batched = not scalars
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
