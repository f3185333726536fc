"""A sampler of KerasHub's, or anything with its `get_next_token`."""

from typing import Any

from keras_gemma.generation.samplers.sampler import Sampler


def can_be_borrowed(sampler: Any) -> bool:
    """Whether `sampler` chooses by `get_next_token` alone, in the loop of its base class.

    Beam and contrastive search have loops of their own.
    """

    def definer(name: str) -> type | None:
        return next((c for c in type(sampler).__mro__ if name in vars(c)), None)

    loop = definer("run_loop")
    return (
        loop is not None and loop is definer("__call__") and loop is not definer("get_next_token")
    )


class BorrowedSampler(Sampler):
    """Takes `temperature`, `get_next_token` and Keras's seed generators from another object."""

    def __init__(self, lender: Any) -> None:
        super().__init__(temperature=getattr(lender, "temperature", 1.0))
        self.lender = lender

    def get_next_token(self, probabilities: Any) -> Any:
        return self.lender.get_next_token(probabilities)

    def _seed_generators(self) -> list[Any]:
        return Sampler._seed_generators(self.lender)
