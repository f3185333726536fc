"""Samples one after the other, from a list or a file's lines, as documents; and their counts.

Knows where a bad one stands, and what to do about it.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from keras_gemma.training.documents import Document, fit_into
from keras_gemma.training.samples import BadSample, read_sample

REASONS_KEPT = 10


@dataclasses.dataclass
class Counts:
    """What became of the samples so far, in all passes."""

    samples: int = 0
    """Those in use."""
    tokens: int = 0
    """Their inputs."""
    learned: int = 0
    """Tokens with a loss."""
    truncated: int = 0
    bad: int = 0
    """Those left out with `skip_bad`."""
    reasons: list[str] = dataclasses.field(default_factory=list)
    """Where and why, for the first bad ones."""


def number(samples: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Samples and their places."""
    for i, sample in enumerate(samples):
        yield f"sample {i}", sample


def read_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Lines of a JSON-lines file that are not blank, and their places. They are not parsed yet."""
    with path.open("rb") as file:
        for i, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path.name}, line {i}", line


class Encoder:
    """Samples to documents; keeps the counts, and decides what a bad sample does."""

    def __init__(
        self, make: Callable[..., Document], length: int, truncate: bool, skip_bad: bool
    ) -> None:
        self.make, self.length = make, length
        self.truncate, self.skip_bad = truncate, skip_bad
        self.source, self.counts = "`source`", Counts()

    def __call__(self, samples: Iterable[tuple[str, Any]]) -> Iterator[Document]:
        """The documents of samples and their places; bytes are lines of JSON."""
        counts = self.counts
        for place, sample in samples:
            try:
                record = parse(sample) if isinstance(sample, bytes) else sample
                document = self.make(read_sample(record))
                document, cut = fit_into(document, self.length, self.truncate)
            except BadSample as problem:
                if not self.skip_bad:
                    raise ValueError(
                        f"{place}: {problem}. Correct it, or leave bad samples out (`skip_bad`)."
                    ) from problem
                counts.bad += 1
                if len(counts.reasons) < REASONS_KEPT:
                    counts.reasons.append(f"{place}: {problem}")
                continue
            counts.samples += 1
            counts.tokens += len(document.inputs)
            counts.learned += int(document.learned.sum())
            counts.truncated += cut
            yield document

    def check_any(self) -> None:
        """Raise a ValueError where nothing was read that could be learned from."""
        counts, bad = self.counts, ""
        if counts.bad:
            bad = f" All {counts.bad} are bad; the first: {counts.reasons[0]}."
        if not counts.samples:
            raise ValueError(f"{self.source} holds no sample that could be learned from.{bad}")


def parse(line: bytes) -> Any:
    """A line of JSON.

    Raises:
        BadSample: it is none.
    """
    try:
        return json.loads(line)
    except json.JSONDecodeError as problem:
        raise BadSample(f"no JSON: {problem.msg} at column {problem.colno}") from problem
    except UnicodeDecodeError as problem:
        raise BadSample(f"no UTF-8: {problem.reason} at byte {problem.start}") from problem
