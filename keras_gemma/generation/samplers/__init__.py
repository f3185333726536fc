"""Samplers: the choice of the next token, one rule a file.

The files:

    sampler.py   the base class, and what a sampler of one's own overrides
    borrowed.py  KerasHub's samplers
    greedy.py    the likeliest token
    random.py    any token, by its probability, or that among the likeliest
    top_k.py     one of the k likeliest
    top_p.py     one of the likeliest that together have probability p
    min_p.py     one of those that are not far less likely than the likeliest
    filters.py   which tokens stay in the running, for all four
    override.py  other settings for one call

Two look further than a token, in loops of their own, which their method `search` begins:

    beam.py         the likeliest text, by several texts side by side
    contrastive.py  a likely token that says something new
"""

from typing import Any

import keras

from keras_gemma.generation.samplers.beam import BeamSampler
from keras_gemma.generation.samplers.borrowed import BorrowedSampler, can_be_borrowed
from keras_gemma.generation.samplers.contrastive import ContrastiveSampler
from keras_gemma.generation.samplers.greedy import GreedySampler
from keras_gemma.generation.samplers.min_p import MinPSampler
from keras_gemma.generation.samplers.random import RandomSampler
from keras_gemma.generation.samplers.sampler import Sampler
from keras_gemma.generation.samplers.top_k import TopKSampler
from keras_gemma.generation.samplers.top_p import TopPSampler

__all__ = [
    "BeamSampler",
    "ContrastiveSampler",
    "GreedySampler",
    "MinPSampler",
    "RandomSampler",
    "Sampler",
    "TopKSampler",
    "TopPSampler",
    "get",
]

NAMES = {
    "beam": BeamSampler,
    "contrastive": ContrastiveSampler,
    "greedy": GreedySampler,
    "min_p": MinPSampler,
    "random": RandomSampler,
    "top_k": TopKSampler,
    "top_p": TopPSampler,
}

SEARCHES = {
    "keras_hub>BeamSampler": (BeamSampler, ("num_beams", "return_all_beams", "temperature")),
    "keras_hub>ContrastiveSampler": (ContrastiveSampler, ("k", "alpha", "temperature")),
}
"""KerasHub's samplers with loops of their own, by the names that it registers with Keras; what
there is here in their place, and the settings that both have."""


def get(sampler: Any) -> Sampler:
    """The sampler that a name stands for, or `sampler` itself.

    Raises:
        ValueError: no such name.
        TypeError: no sampler.
    """
    if isinstance(sampler, str):
        if sampler not in NAMES:
            raise ValueError(
                f"`sampler` must be one of {sorted(NAMES)}, or a "
                f"`keras_gemma.samplers.Sampler`. Received: sampler={sampler!r}"
            )
        return NAMES[sampler]()
    if not isinstance(sampler, Sampler):
        kind, settings = SEARCHES.get(keras.saving.get_registered_name(type(sampler)), (None, ()))
        if kind is not None:
            return kind(**{name: getattr(sampler, name) for name in settings})
        if can_be_borrowed(sampler):
            return BorrowedSampler(sampler)
        raise TypeError(
            f"`sampler` must be one of {sorted(NAMES)}, or a `keras_gemma.samplers.Sampler`. "
            f"Received: {sampler!r} of type {type(sampler).__name__}"
        )
    return sampler
