"""Converts the samplers that both libraries have to KerasHub's and back.

Imports KerasHub only when needed.
"""

import warnings
from types import ModuleType
from typing import Any

from keras_gemma.extras import install_hint
from keras_gemma.generation import samplers

_SAMPLERS = {
    "GreedySampler": (),
    "RandomSampler": ("seed", "temperature"),
    "TopKSampler": ("k", "seed", "temperature"),
    "TopPSampler": ("p", "k", "seed", "temperature"),
    "BeamSampler": ("num_beams", "return_all_beams", "temperature"),
    "ContrastiveSampler": ("k", "alpha", "temperature"),
}
"""Samplers that both libraries have, and their settings."""


def convert_sampler(ours: Any) -> Any:
    """Returns KerasHub's sampler of the same kind and settings, or greedy with a warning."""
    lender = getattr(ours, "lender", None)
    if lender is not None:  # already a KerasHub sampler
        return lender
    kind = type(ours).__name__
    if kind not in _SAMPLERS or type(ours) is not getattr(samplers, kind):
        _warn_of_sampler(f"KerasHub has no sampler {kind}")
        return "greedy"
    if getattr(ours, "length_penalty", 0) != 0:
        warnings.warn(
            "KerasHub's beam search has no `length_penalty`: the new model compares sums. "
            f"Received: length_penalty={ours.length_penalty}",
            UserWarning,
            stacklevel=3,
        )
    if ours.temperature == 0:  # KerasHub divides by it
        return "greedy"
    return getattr(keras_hub().samplers, kind)(**_settings(ours, kind))


def set_sampler(lm: Any, theirs: Any) -> None:
    """Compiles `lm` with the sampler of KerasHub's model, or greedily with a warning."""
    if theirs is None:  # never compiled
        return
    kind = type(theirs).__name__
    if kind in _SAMPLERS and type(theirs) is getattr(keras_hub().samplers, kind):
        lm.compile(sampler=getattr(samplers, kind)(**_settings(theirs, kind)))
        return
    try:
        lm.compile(sampler=theirs)
    except TypeError as error:
        _warn_of_sampler(str(error))
        lm.compile(sampler="greedy")


def _warn_of_sampler(reason: str) -> None:
    warnings.warn(
        f"The new model samples greedily until it is compiled with a sampler: {reason}",
        UserWarning,
        stacklevel=4,
    )


def _settings(sampler: Any, kind: str) -> dict[str, Any]:
    return {name: getattr(sampler, name) for name in _SAMPLERS[kind]}


def keras_hub() -> ModuleType:
    """Imports and returns KerasHub."""
    try:
        import keras_hub as module
    except ModuleNotFoundError as error:
        if error.name != "keras_hub":
            raise
        raise ImportError(
            f"Converting to and from KerasHub needs KerasHub. {install_hint('hub')}"
        ) from error
    return module
