"""Any token, by its probability."""

import dataclasses
from collections.abc import Hashable
from typing import Any

import keras

from keras_gemma.generation.samplers.sampler import Sampler, draw, tempered


@keras.saving.register_keras_serializable(package="keras_gemma")
@dataclasses.dataclass(frozen=True)
class RandomSampler(Sampler):
    """Draws from the whole distribution; see `Sampler` for the arguments."""

    seed: int | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        self.check()

    def rule(self) -> Hashable:
        return "random"

    def choose(self, logits: Any, state: dict[str, Any]) -> Any:
        return draw(tempered(logits, state), state)
