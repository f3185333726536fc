"""Samplers: the choice of the next token.

    sampler.py        base class, for custom samplers too
    greedy.py         most likely token
    random.py         random sampling, and the filters top-k, top-p and min-p
    top_k.py          top-k sampling
    top_p.py          nucleus sampling
    min_p.py          min-p sampling
    noise.py          counter-based random numbers
    borrowed.py       KerasHub's samplers and their subclasses
    override.py       settings of one call
    loop.py           decoding with a function that returns logits, as in KerasHub
    serialization.py  samplers as dictionaries

Settings of two searches, whose loops are in `generation/strategies/`:

    beam.py         beam search
    contrastive.py  contrastive search
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

KERAS_HUB_SEARCHES = {
    "keras_hub>BeamSampler": (BeamSampler, ("num_beams", "return_all_beams", "temperature")),
    "keras_hub>ContrastiveSampler": (ContrastiveSampler, ("k", "alpha", "temperature")),
}
"""KerasHub's searches, by registered name: the class that replaces each, and shared settings."""


def get(sampler: Any) -> Sampler:
    """Returns the sampler of this name, or `sampler` itself.

    Args:
        sampler: One of `"beam"`, `"contrastive"`, `"greedy"`, `"min_p"`, `"random"`, `"top_k"` and
            `"top_p"`, a `Sampler`, or a dictionary from `serialize`. KerasHub samplers are
            converted.

    Raises:
        ValueError: If the name is unknown.
        TypeError: If `sampler` is neither a name nor a sampler.

    Example:

    ```python
    import keras_gemma

    keras_gemma.samplers.get("top_k").k  # 5
    ```
    """
    if isinstance(sampler, dict):
        sampler = keras.saving.deserialize_keras_object(sampler)
    if isinstance(sampler, Sampler):
        return sampler
    if isinstance(sampler, str) and sampler in NAMES:
        return NAMES[sampler]()
    name = keras.saving.get_registered_name(type(sampler))
    if name in KERAS_HUB_SEARCHES:
        search, settings = KERAS_HUB_SEARCHES[name]
        return search(**{setting: getattr(sampler, setting) for setting in settings})
    if can_be_borrowed(sampler):
        return BorrowedSampler(sampler)
    error = ValueError if isinstance(sampler, str) else TypeError
    raise error(
        f"`sampler` must be one of {sorted(NAMES)}, or a `keras_gemma.samplers.Sampler`. "
        f"Received: sampler={sampler!r} of type {type(sampler).__name__}"
    )
