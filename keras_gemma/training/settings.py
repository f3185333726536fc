"""How to train: the numbers of a run, checked."""

import dataclasses
import math
from typing import Any


@dataclasses.dataclass(frozen=True)
class FinetuneSettings:
    """How to train. A run goes on only with the settings that it began with."""

    epochs: int = 1
    """Passes over the data."""
    steps: int | None = None
    """Batches in all, instead of `epochs`; needed for data without a known length."""
    learning_rate: float = 2e-4
    """The highest, after the warm-up; from there it falls to 0 along a cosine."""
    warmup: float = 0.05
    """Share of the steps in which it rises from 0."""
    weight_decay: float = 0.0
    """Of AdamW."""
    clip_norm: float = 1.0
    """The longest gradient, over all variables."""
    accumulate: int = 1
    """Batches whose gradients make one update, their mean. What is left at the end makes none."""
    evaluate_every: int | None = None
    """Steps between evaluations, and between checkpoints; by default an epoch, or, where that is
    less, a tenth of the run, but 20 at least."""
    patience: int | None = None
    """Evaluations without a lower loss after which to stop."""
    rematerialize: bool = False
    """Take less memory and longer: see `GemmaBackbone.rematerialize`."""
    sample_tokens: int = 64
    """Of each sample that is printed."""

    def __post_init__(self) -> None:
        for name in ("epochs", "steps", "accumulate", "evaluate_every", "patience"):
            value = getattr(self, name)
            if value is None and name not in ("epochs", "accumulate"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise self._wrong(name, "a positive integer")
        for name in ("learning_rate", "clip_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise self._wrong(name, "a positive number")
        if not 0 <= self.warmup < 1:
            raise self._wrong("warmup", "a share in [0, 1)")
        if not 0 <= self.weight_decay < 1:
            raise self._wrong("weight_decay", "in [0, 1)")

    def _wrong(self, name: str, wanted: str) -> ValueError:
        return ValueError(f"`{name}` must be {wanted}. Received: {name}={getattr(self, name)!r}")

    def interval(self, total: int, epoch: int | None) -> int:
        """Steps between checkpoints of a run of `total` steps."""
        tenth = max(20, total // 10)
        return min(total, self.evaluate_every or min(tenth, epoch or tenth))


def read_settings(given: dict[str, Any]) -> FinetuneSettings:
    """The settings of a call.

    Raises:
        TypeError: an unknown one.
        ValueError: one that is out of range.
    """
    fields = FinetuneSettings.__dataclass_fields__
    unknown = sorted(given.keys() - fields.keys())
    if unknown:
        raise TypeError(f"`finetune` has no setting {unknown[0]!r}. It has {', '.join(fields)}.")
    return FinetuneSettings(**given)
