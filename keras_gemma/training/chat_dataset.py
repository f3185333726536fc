"""Conversations as batches that `fit` takes, on every backend and without another framework.

What is a list or a file is encoded at once, four bytes a token; what is only iterable may be
larger than memory, and is read as it is needed.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sized
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_gemma.text.tokenizer import GemmaTokenizer
from keras_gemma.training.documents import Document, document_maker
from keras_gemma.training.jsonl import Counts, Encoder, number, read_lines
from keras_gemma.training.row_packing import Batch, Row, in_batches, make_batch, pack


def chat_dataset(
    source: Any,
    tokenizer: GemmaTokenizer,
    sequence_length: int = 1024,
    packing: bool = True,
    loss_on: str = "assistant",
    *,
    batch_size: int = 1,
    truncate: bool = False,
    skip_bad: bool = False,
    shuffle: bool = True,
    seed: int = 0,
) -> "ChatDataset | ChatStream":
    """Training data from conversations or texts: give it to `fit`, or iterate over its batches.

    All batches have the same shape, so nothing is compiled twice. Each document begins with one
    `<bos>`, and packed documents do not see each other.

    Args:
        source: a list of samples, in the forms of `training.samples`; the path of a file with one
            a line, in JSON; or, where they are larger than memory, anything that can be iterated
            over again and again, or a function that returns an iterator.
        tokenizer: the model's.
        sequence_length: positions a row, S.
        packing: put several documents into a row where they fit.
        loss_on: `"assistant"`: the model's turns, and the `<end_of_turn>` after each; or `"all"`.
            Plain texts are always learned as a whole.
        batch_size: rows a batch, B.
        truncate: cut longer samples at their end, and count them; else they are an error.
        skip_bad: leave out samples that cannot be used, and count them; else the first is an error.
        shuffle: another order in each epoch, the same for the same seed. A source that is only
            iterable keeps its order.
        seed: of the order.

    Returns:
        A `keras.utils.PyDataset` of `({"token_ids", "padding_mask"}, labels, weights)`, `[B, S]`
        each. Of an iterable its length is not known: pass `steps_per_epoch` to `fit`.

    Raises:
        ValueError: a bad sample, with its place and the reason; no samples at all; settings out
            of range. Of an iterable, samples are checked when they are read.
        TypeError: a source that can be read only once, or no tokenizer.
        FileNotFoundError: no file at `source`.

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
    if loss_on not in ("assistant", "all"):
        raise ValueError(f"`loss_on` must be 'assistant' or 'all'. Received: loss_on={loss_on!r}")
    for name, value in {"sequence_length": sequence_length, "batch_size": batch_size}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` must be a positive integer. Received: {name}={value!r}")
    shape = Shape(sequence_length, batch_size, tokenizer.pad_token_id, packing)
    encode = Encoder(document_maker(tokenizer, loss_on), sequence_length, truncate, skip_bad)
    if isinstance(source, str | Path):
        encode.source = str(source)
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"There is no file of samples at {str(path)!r}.")
        return ChatDataset(encode, encode(read_lines(path)), shape, shuffle, seed)
    if isinstance(source, Sized) and isinstance(source, Iterable):
        return ChatDataset(encode, encode(number(source)), shape, shuffle, seed)
    if callable(source):
        return ChatStream(encode, source, shape)
    if isinstance(source, Iterator) or not isinstance(source, Iterable):
        raise TypeError(
            "`source` must be a list, a path, something that can be iterated over again and "
            "again, or a function that returns a new iterator: every epoch reads it anew. "
            f"Received: source={source!r:.80}"
        )
    return ChatStream(encode, lambda: iter(source), shape)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of batches: S, B, the id of padding, and whether documents share rows."""

    length: int
    batch_size: int
    pad_id: int
    packing: bool

    def rows(self, documents: Iterable[Document]) -> Iterator[Row]:
        """Rows of documents."""
        return pack(documents, self.length, self.packing)

    def batch(self, rows: list[Row]) -> Batch:
        """Rows as arrays."""
        return make_batch(rows, self.batch_size, self.length, self.pad_id)


class ChatDataset(keras.utils.PyDataset):
    """Batches of samples that are all encoded; made by `chat_dataset`.

    Attributes:
        counts: what became of the samples.
        epoch: decides the order; `fit` counts it up.
    """

    holds_ids = True

    def __init__(
        self,
        encode: Encoder,
        documents: Iterable[Document],
        shape: Shape,
        shuffle: bool,
        seed: int,
    ) -> None:
        super().__init__()
        documents = list(documents)
        encode.check_any()
        self.counts, self.shape, self.shuffle, self.seed = encode.counts, shape, shuffle, seed
        if shuffle:  # before they are packed: rows of a sorted file would all be alike
            order = np.random.default_rng(seed).permutation(len(documents))
            documents = [documents[i] for i in order]
        self.rows = list(shape.rows(documents))
        self.epoch = 0

    def __len__(self) -> int:
        """Batches an epoch."""
        return -(-len(self.rows) // self.shape.batch_size)

    def __getitem__(self, index: int) -> Batch:
        size = self.shape.batch_size
        chosen = self.order()[index * size : (index + 1) * size]
        if not len(chosen):
            raise IndexError(f"batch {index} of {len(self)}")
        return self.shape.batch([self.rows[i] for i in chosen])

    def order(self) -> np.ndarray:
        """The order of the rows in this epoch."""
        if not self.shuffle:
            return np.arange(len(self.rows))
        return np.random.default_rng((self.seed, self.epoch)).permutation(len(self.rows))

    def on_epoch_end(self) -> None:
        """`fit` calls it."""
        self.epoch += 1

    def describe(self) -> str:
        """A line about samples, tokens, rows and what was left out."""
        full = self.counts.tokens / (len(self.rows) * self.shape.length)
        count = f"{len(self.rows):,} row{'s' * (len(self.rows) != 1)}"
        rows = f" in {count} of {self.shape.length:,}, {full:.0%} full"
        return _describe(self.counts, rows)


class ChatStream(keras.utils.PyDataset):
    """Batches of samples that are read as they are needed; made by `chat_dataset`.

    Iterating over it is one pass. `fit` reads pass after pass, `steps_per_epoch` at a time.
    """

    holds_ids = keeps_order = True

    def __init__(self, encode: Encoder, source: Callable[[], Iterable[Any]], shape: Shape) -> None:
        super().__init__()
        self.encode, self.source, self.shape = encode, source, shape
        self.batches: Iterator[Batch] = iter(())

    @property
    def counts(self) -> Counts:
        """What became of the samples so far."""
        return self.encode.counts

    @property
    def num_batches(self) -> None:
        """None: there is no end."""
        return None

    def __iter__(self) -> Iterator[Batch]:
        rows = self.shape.rows(self.encode(number(self.source())))
        for batch in in_batches(rows, self.shape.batch_size):
            yield self.shape.batch(batch)
        self.encode.check_any()

    def __getitem__(self, index: int) -> Batch:
        """The next batch; the first of a pass where `index` is 0."""
        batch = None if index == 0 else next(self.batches, None)
        if batch is None:
            self.batches = iter(self)
            batch = next(self.batches)
        return batch

    def describe(self) -> str:
        """A line about samples, tokens and what was left out, so far."""
        return _describe(self.counts, " so far")


def _describe(counts: Counts, where: str) -> str:
    line = f"{counts.samples:,} samples, {counts.tokens:,} tokens{where}"
    line += f"; {counts.learned:,} tokens are learned"
    line += f"; {counts.truncated:,} truncated" if counts.truncated else ""
    return line + (f"; {counts.bad:,} bad, left out" if counts.bad else "")
