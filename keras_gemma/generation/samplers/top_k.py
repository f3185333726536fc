"""One of the k likeliest tokens (Fan et al., 2018, arXiv:1805.04833)."""

import dataclasses
from collections.abc import Hashable
from typing import Any

import keras
from keras import ops

from keras_gemma.backend.reference import LOWEST
from keras_gemma.generation.samplers.sampler import Sampler, draw, tempered


def keep_top_k(logits: Any, k: int) -> Any:
    """`logits [B, V]` with all but the k largest out of the running; equals of the last stay."""
    smallest = ops.top_k(logits, min(k, logits.shape[-1]))[0][:, -1:]
    return ops.where(logits >= smallest, logits, LOWEST)


def check_k(k: Any) -> None:
    """Raise a ValueError where `k` is no positive integer."""
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"`k` must be an integer >= 1. Received: k={k!r}")


@keras.saving.register_keras_serializable(package="keras_gemma")
@dataclasses.dataclass(frozen=True)
class TopKSampler(Sampler):
    """Draws from the k likeliest tokens, by their probabilities.

    Args:
        k: how many.
        seed, temperature: as of `Sampler`.
    """

    k: int = 5
    seed: int | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        self.check()
        check_k(self.k)

    def rule(self) -> Hashable:
        return "top_k", self.k

    def choose(self, logits: Any, state: dict[str, Any]) -> Any:
        return draw(keep_top_k(tempered(logits, state), self.k), state)
