"""Per-call settings of a sampler."""

import dataclasses
from typing import Any

from keras_gemma.generation.samplers.random import RandomSampler
from keras_gemma.generation.samplers.sampler import Sampler


def override(sampler: Sampler, settings: dict[str, Any]) -> Sampler:
    """Returns a copy of `sampler` with other settings.

    Settings are any of `temperature`, `top_k`, `top_p` and `min_p`. A greedy sampler with a
    temperature or a filter becomes a random one. A custom sampler keeps its type; only its
    dataclass fields can be overridden.
    """
    if not settings:
        return sampler
    if sampler.is_greedy:
        return RandomSampler(seed=sampler.seed, **settings)
    if sampler.has_known_probabilities:
        return RandomSampler(seed=sampler.seed, **(sampler.settings() | settings))
    if settings.keys() <= _fields(sampler):
        return dataclasses.replace(sampler, **settings)
    raise ValueError(
        f"{', '.join(f'`{name}`' for name in settings)} cannot be changed for "
        f"{type(sampler).__name__}, which does not have such a field. Set it in the sampler, or "
        "pass `sampler='random'` too."
    )


def _fields(sampler: Sampler) -> set[str]:
    """Returns the fields that `dataclasses.replace` can change.

    There are none if a subclass defines its own `__init__`.
    """
    definer = next(cls for cls in type(sampler).__mro__ if "__init__" in vars(cls))
    if "__dataclass_fields__" not in vars(definer):
        return set()
    return {field.name for field in dataclasses.fields(sampler) if field.init}
