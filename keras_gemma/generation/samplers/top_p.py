"""One of the likeliest tokens that together reach probability p (arXiv:1904.09751)."""

import dataclasses
from collections.abc import Hashable
from typing import Any

import keras
from keras import ops

from keras_gemma.backend.reference import LOWEST
from keras_gemma.generation.samplers.sampler import Sampler, draw, tempered
from keras_gemma.generation.samplers.top_k import check_k, keep_top_k

HALVINGS = 30
"""Steps of the search for the smallest probability kept: it is found to within 2^-30."""


def keep_top_p(logits: Any, p: Any) -> Any:
    """`logits [B, V]` with all out of the running but the fewest that reach probability `p`.

    The smallest probability kept is found by halving, which needs no sort of the vocabulary.
    """
    probabilities = ops.softmax(logits, axis=-1)
    low = ops.zeros_like(probabilities[:, :1])  # keeps enough
    high = 2 * ops.max(probabilities, axis=-1, keepdims=True)  # keeps nothing
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        kept = ops.where(probabilities >= middle, probabilities, 0.0)
        enough = ops.sum(kept, axis=-1, keepdims=True) >= p
        low, high = ops.where(enough, middle, low), ops.where(enough, high, middle)
    return ops.where(probabilities >= low, logits, LOWEST)


@keras.saving.register_keras_serializable(package="keras_gemma")
@dataclasses.dataclass(frozen=True)
class TopPSampler(Sampler):
    """Draws from the fewest likeliest tokens whose probabilities sum to `p` or more.

    Args:
        p: in (0, 1].
        k: where given, of the k likeliest tokens alone.
        seed, temperature: as of `Sampler`.
    """

    p: float = 0.1
    k: int | None = None
    seed: int | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        self.check()
        if isinstance(self.p, bool) or not isinstance(self.p, int | float) or not 0 < self.p <= 1:
            raise ValueError(f"`p` must be a number in (0, 1]. Received: p={self.p!r}")
        if self.k is not None:
            check_k(self.k)

    def rule(self) -> Hashable:
        return "top_p", self.k

    def settings(self) -> dict[str, float]:
        # Sums of rounded probabilities may end below 1: then nothing would be enough.
        return {**super().settings(), "p": min(self.p, 1 - 1e-6)}

    def choose(self, logits: Any, state: dict[str, Any]) -> Any:
        logits = tempered(logits, state)
        if self.k is not None:
            logits = keep_top_k(logits, self.k)
        return draw(keep_top_p(logits, state["p"]), state)
