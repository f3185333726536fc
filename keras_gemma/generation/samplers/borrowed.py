"""A sampler of KerasHub's, or a user's own subclass of one.

Knows no class of KerasHub's: a sampler is known by its methods.
"""

from collections.abc import Hashable
from typing import Any

import keras

from keras_gemma.generation.samplers.sampler import Sampler

_LOOP = ("__call__", "run_loop", "compute_probabilities")
"""What KerasHub's base class does around `get_next_token`, and this package does in its place."""


def can_be_borrowed(sampler: Any) -> bool:
    """Whether `sampler` chooses by `get_next_token` alone, in the loop of its base class.

    Raises:
        TypeError: it is a sampler of KerasHub's with a loop of its own.
    """

    def definer(name: str) -> type | None:
        return next((c for c in type(sampler).__mro__ if name in vars(c)), None)

    base = definer("run_loop")
    if base is None or definer("get_next_token") is None:
        return False
    own = [name for name in _LOOP if definer(name) is not base]
    if own or definer("get_next_token") is base:
        what = f"defines {' and '.join(own)}" if own else "does not override get_next_token"
        raise TypeError(
            "`sampler` must choose by `get_next_token(probabilities)`, in the loop that is here, "
            f"and {type(sampler).__name__} {what}. A loop of its own works in KerasHub alone: take "
            "'greedy', 'beam', 'contrastive' or another of the samplers here. "
            f"Received: sampler={sampler!r}"
        )
    return True


@keras.saving.register_keras_serializable(package="keras_gemma")
class BorrowedSampler(Sampler):
    """Takes `temperature`, `get_next_token` and Keras's seed generators from another object.

    Whatever else the lender holds is compiled in: it must not change once it has been used.
    """

    def __init__(self, lender: Any) -> None:
        self.lender = lender
        self.check()

    @property
    def temperature(self) -> float:
        """The lender's, as it is when generation begins."""
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
