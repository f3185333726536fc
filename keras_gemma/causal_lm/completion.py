"""What came of a prompt."""

import dataclasses
from typing import Literal

import numpy as np


@dataclasses.dataclass(frozen=True)
class Completion:
    """The new text of one row, and how it came about."""

    text: str | None
    """The text as `generate` returns it; None where the prompts were ids."""
    token_ids: list[int]
    """The new tokens, with the one that ended them."""
    finish_reason: Literal["stop", "length"]
    """`"stop"`: a stop id or a stop string; `"length"`: no more room."""
    logprobs: np.ndarray | None = None
    """float32 `[n]`: the log-probability of each new token, in nats, as the model has it."""
    top_logprobs: list[dict[int, float]] | None = None
    """At each new token the likeliest ids and their log-probabilities."""
    acceptance_rate: float | None = None
    """With a `draft`: of its guesses that were looked at, the share that became the text."""
    score: float | None = None
    """With a `BeamSampler`: what the beams were compared by; without a length penalty, the
    log-probability of all of `token_ids` together."""
