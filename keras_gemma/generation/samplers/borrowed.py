"""Adapter for KerasHub's samplers and their subclasses.

Does not import KerasHub: a sampler is recognized by its methods.
"""

from collections.abc import Hashable
from typing import Any

import keras

from keras_gemma.generation.samplers.sampler import Sampler

_LOOP = ("__call__", "run_loop", "compute_probabilities")
"""Methods of KerasHub's base class that this package replaces."""


def can_be_borrowed(sampler: Any) -> bool:
    """Returns True if `sampler` is a KerasHub sampler that only overrides `get_next_token`.

    Raises a TypeError if it has a custom loop.
    """

    def definer(name: str) -> type | None:
        return next((cls for cls in type(sampler).__mro__ if name in vars(cls)), None)

    base = definer("run_loop")
    if base is None or definer("get_next_token") is None:
        return False
    overridden = [name for name in _LOOP if definer(name) is not base]
    if overridden or definer("get_next_token") is base:
        problem = "does not override get_next_token"
        if overridden:
            problem = f"overrides {' and '.join(overridden)}"
        raise TypeError(
            "`sampler` must override `get_next_token(probabilities)` and no other part of the "
            f"loop, but {type(sampler).__name__} {problem}. Use a sampler of "
            f"`keras_gemma.samplers`, such as 'greedy', 'beam' or 'contrastive'. "
            f"Received: sampler={sampler!r}"
        )
    return True


@keras.saving.register_keras_serializable(package="keras_gemma")
class BorrowedSampler(Sampler):
    """Adapter that takes `temperature`, `get_next_token` and seed generators from another sampler.

    All other attributes of that sampler are compiled in, and must not change after its first use.
    """

    def __init__(self, lender: Any) -> None:
        self.lender = lender
        self.check()

    @property
    def temperature(self) -> float:
        return self.lender.temperature

    def get_next_token(self, probabilities: Any) -> Any:
        return self.lender.get_next_token(probabilities)

    def rule(self) -> Hashable:
        return self.lender

    def get_config(self) -> dict[str, Any]:
        return {"lender": keras.saving.serialize_keras_object(self.lender)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "BorrowedSampler":
        return cls(keras.saving.deserialize_keras_object(config["lender"]))

    def _seed_generators(self) -> list[Any]:
        return Sampler._seed_generators(self.lender)
