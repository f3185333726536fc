"""One of the likeliest tokens that together reach probability p (arXiv:1904.09751)."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import keras

from keras_gemma.generation.samplers.random import DrawingSampler, check_k
from keras_gemma.generation.samplers.sampler import Numbers, Seeds, check_numbers


@keras.saving.register_keras_serializable(package="keras_gemma")
@dataclasses.dataclass(frozen=True)
class TopPSampler(DrawingSampler):
    """Draws from the fewest likeliest tokens whose probabilities sum to `p` or more.

    Args:
        p: in (0, 1].
        k: where given, of the k likeliest tokens alone.
        seed, temperature: as of `Sampler`.
    """

    p: Numbers = 0.1
    k: int | Sequence[int] | None = None
    seed: Seeds = None
    temperature: Numbers = 1.0
    written: ClassVar[dict[str, str]] = {"top_p": "p", "top_k": "k"}

    def __post_init__(self) -> None:
        check_numbers("p", self.p, "a number in (0, 1]", lambda x: 0 < x <= 1)
        if self.k is not None:
            check_k(self.k, "k")
        self.check()

    def settings(self) -> dict[str, Numbers]:
        limits = {"top_p": self.p} if self.k is None else {"top_p": self.p, "top_k": self.k}
        return super().settings() | limits
