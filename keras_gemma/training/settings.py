"""Settings of `finetune`, with checks."""

import dataclasses
import math
from typing import Any

from keras_gemma.checks import check_argument_names, check_integer, check_number

MIN_UPDATES = 200
"""Minimum number of updates of the weights, for which small datasets are repeated by default."""

FEW_UPDATES = 50
"""Number of updates below which a run prints a note."""

LEARNING_RATE, WIDTH = 2e-4, 2048
"""Default learning rate of an adapter, and the hidden dimension of the models that it suits.

With Adam, the best rate of hidden matrices is in inverse proportion to the hidden dimension
(Yang et al., 2022, "Tensor Programs V")."""


@dataclasses.dataclass(frozen=True)
class FinetuneSettings:
    """Settings of a training run. An interrupted run can only continue with the same settings."""

    epochs: int | None = None
    """Passes over the data. `None` takes as many as 200 updates of the weights need."""
    steps: int | None = None
    """Total number of batches; overrides `epochs`. Required for data of unknown length."""
    learning_rate: float | None = None
    """Peak learning rate, after the warmup. It then decays to 0 along a cosine.

    The default of an adapter is 2e-4 for a hidden dimension of 2,048, as in Gemma 2B, and in
    inverse proportion to it for other models. The default of all weights is a tenth of that.
    """
    warmup: float = 0.05
    """Fraction of the steps in which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """Weight decay of AdamW."""
    clip_norm: float = 1.0
    """Maximum norm of the gradient, over all variables."""
    accumulate: int = 1
    """Batches per update, which averages their gradients. A last incomplete group is not used."""
    evaluate_every: int | None = None
    """Steps between evaluations, and between checkpoints.

    By default one epoch or a tenth of the run, whichever is shorter. The tenth is at least 20
    steps.
    """
    patience: int | None = None
    """Evaluations without a lower loss after which training stops. `None` disables this."""
    rematerialize: bool = False
    """If True, training needs less memory and more time: see `GemmaBackbone.rematerialize`."""
    sample_tokens: int = 64
    """Maximum length of a printed sample, in tokens."""

    def __post_init__(self) -> None:
        for name in ("epochs", "steps", "accumulate", "evaluate_every", "patience"):
            value = getattr(self, name)
            if value is not None or name == "accumulate":
                check_integer(name, value)
        if self.learning_rate is not None:
            check_number("learning_rate", self.learning_rate, "(0, inf)")
        check_number("clip_norm", self.clip_norm, "(0, inf)")
        check_number("warmup", self.warmup, "[0, 1)")
        check_number("weight_decay", self.weight_decay, "[0, 1)")

    def resolve(
        self, num_batches: int | None, hidden_dim: int, has_adapter: bool
    ) -> "FinetuneSettings":
        """Returns the settings with numbers for the defaults that depend on data and model."""
        epochs, learning_rate = self.epochs, self.learning_rate
        if epochs is None:
            updates = 0 if self.steps else MIN_UPDATES
            epochs = max(1, math.ceil(updates * self.accumulate / (num_batches or 1)))
        if learning_rate is None:
            learning_rate = LEARNING_RATE * WIDTH / hidden_dim * (1 if has_adapter else 0.1)
        return dataclasses.replace(self, epochs=epochs, learning_rate=learning_rate)

    def interval(self, total: int, epoch: int | None) -> int:
        """Returns the number of steps between checkpoints.

        Args:
            total: Steps of the run.
            epoch: Steps of an epoch. `None` if unknown.
        """
        tenth = max(20, total // 10)
        return min(total, self.evaluate_every or min(tenth, epoch or tenth))


def read_settings(arguments: dict[str, Any]) -> FinetuneSettings:
    """Converts keyword arguments of `finetune` to settings.

    Raises:
        TypeError: If a setting is unknown.
        ValueError: If a setting is out of range.
    """
    check_argument_names("finetune", arguments, FinetuneSettings.__dataclass_fields__)
    return FinetuneSettings(**arguments)
