"""Tensors in files against the weights of a model: compare all, then stream one by one.

Knows the names and shapes of `GemmaConfig.weight_shapes()` and of a file's tensors, and the
`Place` that joins them. Does not know any file format: readers hand in `StoredTensor`s.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

FLOAT_DTYPES = ("float64", "float32", "bfloat16", "float16")
LISTED_PROBLEMS = 50


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor that lies in a file, not read yet."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


def _same(array: np.ndarray) -> np.ndarray:
    return array


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a weight lies in a checkpoint, and how its logical layout becomes the stored one."""

    name: str
    shape: tuple[int, ...]
    to_logical: Callable[[np.ndarray], np.ndarray] = _same
    to_stored: Callable[[np.ndarray], np.ndarray] = _same
    spare_rows: int = 0
    """How many rows the stored tensor may have beyond `shape`; they are left unread."""

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Whether a stored tensor of this shape fits."""
        if shape == self.shape:
            return True
        return (
            self.spare_rows > 0
            and len(shape) == len(self.shape)
            and shape[1:] == self.shape[1:]
            and self.shape[0] < shape[0] <= self.shape[0] + self.spare_rows
        )


def check(
    stored: Mapping[str, StoredTensor],
    places: Mapping[str, Place],
    source: Any,
    ignored: Collection[str] = (),
) -> None:
    """Compare what a checkpoint holds with what the model needs, reading no tensor.

    Args:
        stored: the tensors of the checkpoint, by their names in it.
        places: for each weight of the model, where it should lie.
        source: the checkpoint's path, for the message.
        ignored: names in the checkpoint that are no weights of the model, and harmless.

    Raises:
        ValueError: tensors are missing, unexpected, of another shape or not floating point;
            the message lists all of them.
    """
    problems = []
    for place in places.values():
        tensor = stored.get(place.name)
        if tensor is None:
            problems.append(f"missing: {place.name} {place.shape}")
        elif not place.accepts(tensor.shape):
            problems.append(f"shape: {place.name} is {tensor.shape}, expected {place.shape}")
        elif tensor.dtype not in FLOAT_DTYPES:
            problems.append(f"dtype: {place.name} is {tensor.dtype}, expected a float")
    known = {place.name for place in places.values()} | set(ignored)
    problems += [f"unexpected: {n} {t.shape}" for n, t in stored.items() if n not in known]
    if problems:
        rest = len(problems) - LISTED_PROBLEMS
        raise ValueError(
            f"The tensors in {source} do not fit its config.json "
            f"({len(problems)} problems). Use the config.json that these weights were saved "
            "with, or save them again:\n  "
            + "\n  ".join(problems[:LISTED_PROBLEMS])
            + (f"\n  … and {rest} more" if rest > 0 else "")
        )


def stream(
    stored: Mapping[str, StoredTensor], places: Mapping[str, Place], weights: Mapping[str, Any]
) -> None:
    """Read each tensor once and assign it; no two are in memory at a time.

    Args:
        stored: the tensors of the checkpoint, already checked.
        places: where each weight lies.
        weights: `backbone.named_weights()`; every name of it is assigned.
    """
    for name, weight in weights.items():
        place = places[name]
        array = stored[place.name].read()
        if place.spare_rows:
            array = array[: place.shape[0]]
        weight.assign(place.to_logical(array))
