"""A sampler with some of its settings changed, for one call."""

from typing import Any

from keras_gemma.generation.samplers.greedy import GreedySampler
from keras_gemma.generation.samplers.random import DrawingSampler, RandomSampler
from keras_gemma.generation.samplers.sampler import Sampler


def override(sampler: Sampler, settings: dict[str, Any]) -> Sampler:
    """`sampler` with `settings` in the place of its own.

    A greedy sampler that is given a temperature or a filter becomes a random one.

    Args:
        settings: any of `temperature`, `top_k`, `top_p` and `min_p`.

    Raises:
        ValueError: a sampler that has no such settings, or a value out of range.
    """
    if not settings:
        return sampler
    if isinstance(sampler, GreedySampler):
        return RandomSampler(seed=sampler.seed, **settings)
    if isinstance(sampler, DrawingSampler):
        return RandomSampler(seed=sampler.seed, **(sampler.settings() | settings))
    raise ValueError(
        f"{', '.join(f'`{name}`' for name in settings)} cannot be changed for "
        f"{type(sampler).__name__}, whose rule is its own. Set it there, or pass "
        "`sampler='random'` too."
    )
