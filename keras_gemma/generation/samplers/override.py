"""A sampler with some of its settings changed, for one call."""

import dataclasses
from typing import Any

from keras_gemma.generation.samplers.greedy import GreedySampler
from keras_gemma.generation.samplers.random import DrawingSampler, RandomSampler
from keras_gemma.generation.samplers.sampler import Sampler


def override(sampler: Sampler, settings: dict[str, Any]) -> Sampler:
    """`sampler` with `settings` in the place of its own.

    The greedy sampler, given a temperature or a filter, becomes a random one. A class of a user's
    own keeps its rule: of it, and of other rules, only what is a field of the class can change.

    Args:
        settings: any of `temperature`, `top_k`, `top_p` and `min_p`.

    Raises:
        ValueError: a sampler that has no such settings, or a value out of range.
    """
    if not settings:
        return sampler
    if isinstance(sampler, GreedySampler) and not sampler.is_own():
        return RandomSampler(seed=sampler.seed, **settings)
    if isinstance(sampler, DrawingSampler) and not sampler.is_own():
        return RandomSampler(seed=sampler.seed, **(sampler.settings() | settings))
    if settings.keys() <= _fields(sampler):
        return dataclasses.replace(sampler, **settings)
    raise ValueError(
        f"{', '.join(f'`{name}`' for name in settings)} cannot be changed for "
        f"{type(sampler).__name__}, whose rule is its own. Set it there, or pass "
        "`sampler='random'` too."
    )


def _fields(sampler: Sampler) -> set[str]:
    """What `dataclasses.replace` can change: nothing behind a constructor of its own."""
    maker = next(c for c in type(sampler).__mro__ if "__init__" in vars(c))
    if "__dataclass_fields__" not in vars(maker):
        return set()
    return {field.name for field in dataclasses.fields(sampler) if field.init}
