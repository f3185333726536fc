"""One of the k likeliest tokens (Fan et al., 2018, arXiv:1805.04833)."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import keras

from keras_gemma.generation.samplers.random import DrawingSampler, check_k
from keras_gemma.generation.samplers.sampler import Numbers, Seeds


@keras.saving.register_keras_serializable(package="keras_gemma")
@dataclasses.dataclass(frozen=True)
class TopKSampler(DrawingSampler):
    """Draws from the k likeliest tokens, by their probabilities.

    Args:
        k: how many.
        seed, temperature: as of `Sampler`.
    """

    k: int | Sequence[int] = 5
    seed: Seeds = None
    temperature: Numbers = 1.0
    written: ClassVar[dict[str, str]] = {"top_k": "k"}

    def __post_init__(self) -> None:
        check_k(self.k, "k")
        self.check()

    def settings(self) -> dict[str, Numbers]:
        return super().settings() | {"top_k": self.k}
