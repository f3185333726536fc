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
