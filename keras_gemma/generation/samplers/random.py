"""Any token, by its probability, or by that among the likeliest."""

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any

import keras

from keras_gemma.generation.samplers.filters import FILTERS
from keras_gemma.generation.samplers.sampler import (
    Numbers,
    Sampler,
    Seeds,
    check_numbers,
    draw,
    tempered,
)


class DrawingSampler(Sampler):
    """Draws from what the filters among its settings leave in the running."""

    def check(self) -> None:
        super().check()
        limits = self.settings()
        if "top_k" in limits:
            check_k(limits["top_k"])
        for name in ("top_p", "min_p"):
            if name in limits:
                check_numbers(name, limits[name], "a number in (0, 1]", lambda x: 0 < x <= 1)

    def rule(self) -> Hashable:
        return "draw", *(name for name in FILTERS if name in self.settings())

    def choose(self, logits: Any, state: dict[str, Any]) -> Any:
        return draw(limit(logits, state), state)


def limit(logits: Any, state: dict[str, Any]) -> Any:
    """Logits `[B, V]` tempered and filtered, as the settings in the sampler's `state` say."""
    logits = tempered(logits, state)
    for name, keep in FILTERS.items():
        if name in state:
            logits = keep(logits, state[name])
    return logits


def check_k(k: Any, name: str = "top_k") -> None:
    """Raise a ValueError where `k` is no positive integer, nor a list of such."""
    check_numbers(name, k, "an integer >= 1", lambda x: 1 <= x < 2**31, whole=True)


@keras.saving.register_keras_serializable(package="keras_gemma")
@dataclasses.dataclass(frozen=True)
class RandomSampler(DrawingSampler):
    """Draws from the whole distribution, or from what is left of it.

    Args:
        seed, temperature: as of `Sampler`.
        top_k: of the so many likeliest alone.
        top_p: of the fewest likeliest alone that together have this probability.
        min_p: of those alone that have this share of the likeliest one's probability.
    """

    seed: Seeds = None
    temperature: Numbers = 1.0
    top_k: int | Sequence[int] | None = None
    top_p: Numbers | None = None
    min_p: Numbers | None = None

    def __post_init__(self) -> None:
        self.check()

    def settings(self) -> dict[str, Numbers]:
        limits = {"top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}
        given = {name: value for name, value in limits.items() if value is not None}
        return super().settings() | given
