"""Conversations and texts as batches for `fit`, on every backend.

Lists and files are encoded at once, with four bytes per token. Other iterables may be larger than
memory; they are read during training.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sized
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_gemma.checks import check_integer, check_one_of
from keras_gemma.text.tokenizer import GemmaTokenizer
from keras_gemma.training.documents import Document, make_document
from keras_gemma.training.jsonl import Counts, Encoder, read_samples
from keras_gemma.training.row_packing import (
    Batch,
    Row,
    choose_length,
    in_batches,
    make_batch,
    pack,
)


def chat_dataset(
    source: Any,
    tokenizer: GemmaTokenizer,
    sequence_length: int | None = None,
    packing: bool = True,
    loss_on: str = "assistant",
    *,
    max_sequence_length: int = 1024,
    batch_size: int = 1,
    truncate: bool = False,
    skip_bad: bool = False,
    shuffle: bool = True,
    seed: int = 0,
) -> "ChatDataset | ChatStream":
    """Creates a training dataset from conversations or texts, for `fit` or for iteration.

    All batches have the same shape, so programs are compiled once. Each document begins with one
    `<bos>`. Packed documents do not attend to each other.

    Args:
        source: A list of samples in the formats of `training.samples`, or the path of a JSON-lines
            file. For data larger than memory, an iterable that can be read several times, or a
            function that returns an iterator.
        tokenizer: Tokenizer of the model.
        sequence_length: Positions of a row, S. `None` chooses a length that fits the longest
            sample, and is longer for large datasets. Streams use `max_sequence_length`.
        packing: If True, a row has several documents if they fit.
        loss_on: `"assistant"` learns the model turns and the `<end_of_turn>` after each. `"all"`
            learns all tokens. All tokens of plain texts are learned.
        max_sequence_length: Maximum of the chosen `sequence_length`. Defaults to 1024.
        batch_size: Rows of a batch, B.
        truncate: If True, longer samples are truncated and counted. If False, they are errors.
        skip_bad: If True, bad samples are skipped and counted. If False, the first is an error.
        shuffle: If True, the order differs in each epoch. Iterables and functions keep their
            order.
        seed: Seed of the order.

    Returns:
        A `keras.utils.PyDataset` of `({"token_ids", "padding_mask"}, labels, weights)`, `[B, S]`
        each. The length of an iterable is unknown: pass `steps_per_epoch` to `fit`.

    Raises:
        ValueError: If a sample is bad, there are no samples, or an argument is out of range.
            Samples of an iterable are checked when they are read.
        TypeError: If `source` can be read only once, or `tokenizer` is not a tokenizer.
        FileNotFoundError: If the file `source` does not exist.

    Example:

    ```python
    import keras_gemma
    from keras_gemma import training

    lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
    data = training.chat_dataset(
        [{"prompt": "Who is there?", "completion": "Nay, answer me."}],
        lm.preprocessor.tokenizer,
        sequence_length=64,
    )
    print(data.describe())
    lm.fit(data)
    ```
    """
    if not isinstance(tokenizer, GemmaTokenizer):
        raise TypeError(
            "`tokenizer` must be a GemmaTokenizer, such as `lm.preprocessor.tokenizer`. "
            f"Received: tokenizer={tokenizer!r}"
        )
    check_one_of("loss_on", loss_on, ("assistant", "all"))
    chooses_length = sequence_length is None
    sequence_length = max_sequence_length if chooses_length else sequence_length
    check_integer("max_sequence_length" if chooses_length else "sequence_length", sequence_length)
    check_integer("batch_size", batch_size)
    shape = Shape(sequence_length, batch_size, tokenizer.pad_token_id, packing)
    make = partial(make_document, tokenizer=tokenizer, loss_on=loss_on)
    encoder = Encoder(make, sequence_length, truncate, skip_bad)
    is_path = isinstance(source, str | Path)
    if is_path or (isinstance(source, Sized) and isinstance(source, Iterable)):
        encoder.source = str(source) if is_path else encoder.source
        samples = read_samples(source)
        return ChatDataset(encoder, samples, shape, shuffle, seed, chooses_length)
    if callable(source):
        return ChatStream(encoder, source, shape)
    if isinstance(source, Iterator) or not isinstance(source, Iterable):
        raise TypeError(
            "`source` must be a list, a path, an iterable that can be read several times, or a "
            "function that returns a new iterator, because every epoch reads it again. "
            f"Received: source={source!r:.80}"
        )
    return ChatStream(encoder, lambda: iter(source), shape)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Shape of batches."""

    length: int
    """Positions of a row, S."""
    batch_size: int
    """Rows of a batch, B."""
    pad_id: int
    """Id of `<pad>`."""
    packing: bool
    """If True, documents share rows."""

    def rows(self, documents: Iterable[Document]) -> Iterator[Row]:
        """Yields rows of documents."""
        return pack(documents, self.length, self.packing)

    def batch(self, rows: list[Row]) -> Batch:
        """Returns rows as arrays."""
        return make_batch(rows, self.batch_size, self.length, self.pad_id)


class ChatDataset(keras.utils.PyDataset):
    """Batches of samples that are already encoded; created by `chat_dataset`.

    Attributes:
        counts: Counts of the samples.
        epoch: Number of the epoch, which determines the order. `fit` increments it.
    """

    holds_ids = True

    def __init__(
        self,
        encoder: Encoder,
        samples: Iterable[tuple[str, Any]],
        shape: Shape,
        shuffle: bool,
        seed: int,
        chooses_length: bool = False,
    ) -> None:
        super().__init__()
        documents = list(encoder(samples))
        encoder.check_any()
        if chooses_length:
            sizes = [len(document.inputs) for document in documents]
            length = choose_length(sizes, shape.batch_size, shape.length, shape.packing)
            shape = dataclasses.replace(shape, length=length)
        self.counts, self.shape, self.shuffle, self.seed = encoder.counts, shape, shuffle, seed
        if shuffle:  # before packing, because neighbors in a sorted file resemble each other
            order = np.random.default_rng(seed).permutation(len(documents))
            documents = [documents[i] for i in order]
        self.rows = list(shape.rows(documents))
        self.epoch = 0

    def __len__(self) -> int:
        """Returns the number of batches per epoch."""
        return -(-len(self.rows) // self.shape.batch_size)

    def __getitem__(self, index: int) -> Batch:
        size = self.shape.batch_size
        rows = self.order()[index * size : (index + 1) * size]
        if not len(rows):
            raise IndexError(f"Index {index} is out of range for {len(self)} batches.")
        return self.shape.batch([self.rows[i] for i in rows])

    def order(self) -> np.ndarray:
        """Returns the order of the rows in this epoch."""
        if not self.shuffle:
            return np.arange(len(self.rows))
        return np.random.default_rng((self.seed, self.epoch)).permutation(len(self.rows))

    def on_epoch_end(self) -> None:
        """Selects the order of the next epoch; called by `fit`."""
        self.epoch += 1

    def describe(self) -> str:
        """Returns a summary of samples, tokens, rows and skipped samples, on one line."""
        full = self.counts.tokens / (len(self.rows) * self.shape.length)
        count = f"{len(self.rows):,} row{'s' * (len(self.rows) != 1)}"
        rows = f" in {count} of {self.shape.length:,}, {full:.0%} full"
        return _describe(self.counts, rows)


class ChatStream(keras.utils.PyDataset):
    """Batches of samples that are read during training; created by `chat_dataset`.

    Iteration is one pass over the data. `fit` repeats the data, with `steps_per_epoch` batches
    per epoch.
    """

    holds_ids = keeps_order = True

    def __init__(self, encoder: Encoder, source: Callable[[], Iterable[Any]], shape: Shape) -> None:
        super().__init__()
        self.encoder, self.source, self.shape = encoder, source, shape
        self.batches: Iterator[Batch] = iter(())

    @property
    def counts(self) -> Counts:
        """Counts of the samples read so far."""
        return self.encoder.counts

    @property
    def num_batches(self) -> None:
        """Number of batches; `None` because the data repeats without end."""
        return None

    def __iter__(self) -> Iterator[Batch]:
        rows = self.shape.rows(self.encoder(read_samples(self.source())))
        for batch in in_batches(rows, self.shape.batch_size):
            yield self.shape.batch(batch)
        self.encoder.check_any()

    def __getitem__(self, index: int) -> Batch:
        """Returns the next batch. Index 0 starts a new pass over the data."""
        batch = None if index == 0 else next(self.batches, None)
        if batch is None:
            self.batches = iter(self)
            batch = next(self.batches)
        return batch

    def describe(self) -> str:
        """Returns a summary of samples, tokens and skipped samples so far, on one line."""
        return _describe(self.counts, " so far")


def _describe(counts: Counts, extent: str) -> str:
    line = f"{counts.samples:,} samples, {counts.tokens:,} tokens{extent}"
    line += f"; {counts.learned:,} tokens are learned"
    line += f"; {counts.truncated:,} truncated" if counts.truncated else ""
    return line + (f"; {counts.bad:,} bad, skipped" if counts.bad else "")
