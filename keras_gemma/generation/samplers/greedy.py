"""The likeliest token, always."""

import dataclasses
from collections.abc import Hashable
from typing import Any

import keras

from keras_gemma.generation.samplers.sampler import Numbers, Sampler, Seeds, likeliest


@keras.saving.register_keras_serializable(package="keras_gemma")
@dataclasses.dataclass(frozen=True)
class GreedySampler(Sampler):
    """Takes the likeliest token. Temperature and seed change nothing."""

    temperature: Numbers = 1.0
    seed: Seeds = None

    def __post_init__(self) -> None:
        self.check()

    def rule(self) -> Hashable:
        return "greedy"

    def choose(self, logits: Any, state: dict[str, Any]) -> Any:
        return likeliest(logits)
