"""Output of `generate` with log-probabilities."""

import dataclasses
from typing import Literal

import numpy as np


@dataclasses.dataclass(frozen=True)
class Completion:
    """Output of one generated sequence."""

    text: str | None
    """Text as returned by `generate`. `None` if the prompts were token ids."""
    token_ids: list[int]
    """New token ids, including the stop token."""
    finish_reason: Literal["stop", "length"]
    """`"stop"` after a stop token or stop string, `"length"` at the length limit."""
    logprobs: np.ndarray | None = None
    """Log-probability of each new token under the model, in nats: float32 `[n]`."""
    top_logprobs: list[dict[int, float]] | None = None
    """Top-k token ids and their log-probabilities, for each new token."""
    acceptance_rate: float | None = None
    """Share of the verified draft tokens that were accepted. Only set with a `draft`."""
    score: float | None = None
    """Beam score; without a length penalty, the total log-probability of `token_ids`. Only set with
    a `BeamSampler`."""
