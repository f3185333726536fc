"""One of the tokens that are not far less likely than the likeliest (arXiv:2407.01082)."""

import dataclasses

import keras

from keras_gemma.generation.samplers.random import DrawingSampler
from keras_gemma.generation.samplers.sampler import Numbers, Seeds


@keras.saving.register_keras_serializable(package="keras_gemma")
@dataclasses.dataclass(frozen=True)
class MinPSampler(DrawingSampler):
    """Draws from the tokens with at least `min_p` times the probability of the likeliest.

    Args:
        min_p: in (0, 1].
        seed, temperature: as of `Sampler`.
    """

    min_p: Numbers = 0.05
    seed: Seeds = None
    temperature: Numbers = 1.0

    def __post_init__(self) -> None:
        self.check()

    def settings(self) -> dict[str, Numbers]:
        return super().settings() | {"min_p": self.min_p}
