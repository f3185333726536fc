"""Packing of documents into rows of equal length, and of rows into batches of equal shape.

    token_ids      [a a a b b b b 0]      two documents and padding
    padding_mask   [1 1 1 2 2 2 2 0]      number of the document; attention stays within it

Knows nothing about text.
"""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from keras_gemma.training.documents import Document

MIN_BATCHES = 64
"""Minimum number of batches per epoch for which rows are longer than the longest document."""

OPEN_ROWS = 64
"""Maximum number of rows that wait for a document that fits into their free positions."""

Row = list[Document]
Batch = tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]
"""`({"token_ids", "padding_mask"}, labels, weights)`, each `[B, S]`; weights are float32."""


def choose_length(sizes: list[int], batch_size: int, limit: int, packing: bool) -> int:
    """Returns the positions of a row that suits documents of these sizes, at most `limit`.

    A row fits the longest document. With `packing`, it is longer if the documents fill enough
    batches: a few samples in one row would make one update of the weights.
    """
    length = max(sizes)
    if packing:
        length = max(length, sum(sizes) // (MIN_BATCHES * batch_size))
    return min(limit, -(-length // 16) * 16)


def pack(documents: Iterable[Document], length: int, packing: bool = True) -> Iterator[Row]:
    """Yields rows of at most `length` positions.

    Each document goes to the open row with the least free space that fits it (best fit). Without
    `packing`, each row has one document.
    """
    open_rows: list[tuple[int, Row]] = []  # free positions and documents
    for document in documents:
        size = len(document.inputs)
        if not packing:
            yield [document]
            continue
        fitting = [i for i, (free, _) in enumerate(open_rows) if free >= size]
        if fitting:
            i = min(fitting, key=lambda i: open_rows[i][0])
            free, row = open_rows[i]
            row.append(document)
            open_rows[i] = free - size, row
        else:
            open_rows.append((length - size, [document]))
        fullest = min(range(len(open_rows)), key=lambda i: open_rows[i][0])
        if open_rows[fullest][0] == 0 or len(open_rows) > OPEN_ROWS:
            yield open_rows.pop(fullest)[1]
    for _, row in open_rows:
        yield row


def make_batch(rows: list[Row], batch_size: int, length: int, pad_id: int) -> Batch:
    """Returns a batch of `batch_size` rows. Missing rows are padding."""
    ids = np.full((batch_size, length), pad_id, "int32")
    labels = np.full((batch_size, length), pad_id, "int32")
    mask = np.zeros((batch_size, length), "int32")
    weights = np.zeros((batch_size, length), "float32")
    for i, row in enumerate(rows):
        start = 0
        for number, document in enumerate(row, start=1):
            span = i, slice(start, start + len(document.inputs))
            ids[span], labels[span] = document.inputs, document.labels
            mask[span], weights[span] = number, document.learned
            start += len(document.inputs)
    return {"token_ids": ids, "padding_mask": mask}, labels, weights


def in_batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yields lists of `size` items; the last may be shorter."""
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
