"""Documents from a list of samples or the lines of a JSON-lines file, with counts.

Adds the place of a sample to its errors, and skips bad samples if asked to.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from keras_gemma.training.documents import Document, fit_to_length
from keras_gemma.training.samples import BadSample, read_sample

MAX_REASONS = 10
"""Maximum number of bad samples whose reasons are recorded."""


@dataclasses.dataclass
class Counts:
    """Counts of all samples read so far, over all passes."""

    samples: int = 0
    """Number of samples in use."""
    tokens: int = 0
    """Number of input tokens."""
    learned: int = 0
    """Number of tokens with a loss."""
    truncated: int = 0
    """Number of truncated samples."""
    bad: int = 0
    """Number of samples skipped with `skip_bad`."""
    reasons: list[str] = dataclasses.field(default_factory=list)
    """Place and reason of the first bad samples."""


def read_samples(source: str | Path | Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Yields place and sample. The lines of a file are bytes, which `parse` reads.

    Args:
        source: Samples, or the path of a JSON-lines file, whose blank lines are skipped.

    Raises:
        FileNotFoundError: If the file `source` does not exist.
    """
    if not isinstance(source, str | Path):
        return ((f"sample {i}", sample) for i, sample in enumerate(source))
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"The file of samples {str(path)!r} does not exist.")
    return _read_lines(path)


def _read_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    with path.open("rb") as file:
        for i, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path.name}, line {i}", line


class Encoder:
    """Converts samples to documents and counts them.

    Args:
        make: Function from the turns or the text of a sample to a document.
        length: Maximum number of inputs of a document.
        truncate: If True, longer documents are truncated. If False, they are bad samples.
        skip_bad: If True, bad samples are skipped. If False, they raise an error.
    """

    def __init__(
        self, make: Callable[..., Document], length: int, truncate: bool, skip_bad: bool
    ) -> None:
        self.make, self.length = make, length
        self.truncate, self.skip_bad = truncate, skip_bad
        self.source, self.counts = "`source`", Counts()

    def __call__(self, samples: Iterable[tuple[str, Any]]) -> Iterator[Document]:
        """Yields the documents of samples from `read_samples`."""
        counts = self.counts
        for place, sample in samples:
            try:
                document = self.make(read_sample(parse(sample)))
                document, is_truncated = fit_to_length(document, self.length, self.truncate)
            except BadSample as problem:
                if not self.skip_bad:
                    raise ValueError(
                        f"{place}: {problem}. Correct it, or skip bad samples (`skip_bad`)."
                    ) from problem
                counts.bad += 1
                if len(counts.reasons) < MAX_REASONS:
                    counts.reasons.append(f"{place}: {problem}")
                continue
            counts.samples += 1
            counts.tokens += len(document.inputs)
            counts.learned += int(document.learned.sum())
            counts.truncated += is_truncated
            yield document

    def check_any(self) -> None:
        """Raises a ValueError if no sample was usable."""
        counts, bad = self.counts, ""
        if counts.bad:
            bad = f" All {counts.bad} are bad; the first: {counts.reasons[0]}."
        if not counts.samples:
            raise ValueError(f"{self.source} has no usable sample.{bad}")


def parse(sample: Any) -> Any:
    """Parses a line of JSON, if `sample` is bytes.

    Raises:
        BadSample: If the line is not valid JSON or UTF-8.
    """
    if not isinstance(sample, bytes):
        return sample
    try:
        return json.loads(sample)
    except json.JSONDecodeError as problem:
        raise BadSample(f"invalid JSON: {problem.msg} at column {problem.colno}") from problem
    except UnicodeDecodeError as problem:
        raise BadSample(f"invalid UTF-8: {problem.reason} at byte {problem.start}") from problem
