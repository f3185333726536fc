"""Documents put side by side in rows of one length, and rows in batches of one shape.

    token_ids      [a a a b b b b 0]      two documents and a padding
    padding_mask   [1 1 1 2 2 2 2 0]      whose each position is; attention stays within

Knows no text.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from keras_gemma.training.documents import Document

OPEN_ROWS = 64
"""Rows that wait for a document that fits into what they have left."""

Row = list[Document]
Batch = tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]
"""`({"token_ids", "padding_mask"}, labels, weights)`, each `[B, S]`; weights are float32."""


def pack(documents: Iterable[Document], length: int, packing: bool = True) -> Iterator[Row]:
    """Rows of at most `length` positions; each document goes where the least is left over.

    Without `packing` each has a row of its own.
    """
    open_rows: list[tuple[int, Row]] = []  # what is left, and what is there
    for document in documents:
        size = len(document.inputs)
        if not packing:
            yield [document]
            continue
        fitting = [i for i, (left, _) in enumerate(open_rows) if left >= size]
        if fitting:
            i = min(fitting, key=lambda i: open_rows[i][0])
            left, row = open_rows[i]
            row.append(document)
            open_rows[i] = left - size, row
        else:
            open_rows.append((length - size, [document]))
        fullest = min(range(len(open_rows)), key=lambda i: open_rows[i][0])
        if open_rows[fullest][0] == 0 or len(open_rows) > OPEN_ROWS:
            yield open_rows.pop(fullest)[1]
    for _, row in open_rows:
        yield row


def make_batch(rows: list[Row], batch_size: int, length: int, pad_id: int) -> Batch:
    """A batch of `batch_size` rows; where there are fewer, the rest is padding."""
    ids = np.full((batch_size, length), pad_id, "int32")
    labels = np.full((batch_size, length), pad_id, "int32")
    mask = np.zeros((batch_size, length), "int32")
    weights = np.zeros((batch_size, length), "float32")
    for i, row in enumerate(rows):
        start = 0
        for number, document in enumerate(row, start=1):
            here = i, slice(start, start + len(document.inputs))
            ids[here], labels[here] = document.inputs, document.labels
            mask[here], weights[here] = number, document.learned
            start += len(document.inputs)
    return {"token_ids": ids, "padding_mask": mask}, labels, weights


def in_batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` items; the last may have fewer."""
    batch: list[Any] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
