"""Default generation settings of a served model, taken from `compile()`."""

import dataclasses
from typing import Any

import numpy as np

from keras_gemma.checks import check_integer
from keras_gemma.generation.stopping import check_stop_token_ids

OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
"""Value of each filter that disables it."""

DEFAULT_MAX_NEW_TOKENS = 256

UNSUPPORTED_SETTINGS = (
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "response_format",
    "logits_processors",
    "num_return_sequences",
    "return_logprobs",
)
"""Settings of `compile()` that a served model does not support."""


@dataclasses.dataclass(frozen=True)
class ServingOptions:
    """Default settings of a call, and limits."""

    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    temperature: float = 0.0
    top_k: int = OFF["top_k"]
    top_p: float = OFF["top_p"]
    min_p: float = OFF["min_p"]
    seed: int = -1  # uses a new random seed in each call
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    max_batch_size: int | None = None


def options_of(lm: Any, max_new_tokens: int | None, max_batch_size: int | None) -> ServingOptions:
    """Returns the serving options of a `GemmaCausalLM`, if a served model supports its settings."""
    for name, value in (("max_new_tokens", max_new_tokens), ("max_batch_size", max_batch_size)):
        if value is not None:
            check_integer(name, value)
    settings = lm.generation_settings
    sampler = settings.choose_sampler(lm.sampler)
    compiled = settings.explicit_settings()
    for name in UNSUPPORTED_SETTINGS:
        if name in compiled:
            raise ValueError(
                f"A served model does not support `{name}`: call `compile` without it before "
                f"`export`. Received: {name}={compiled[name]!r:.80}"
            )
    if not sampler.has_known_probabilities:
        raise ValueError(
            "The sampler of a served model must be 'greedy', 'random', 'top_k', 'top_p' or "
            "'min_p': call `compile(sampler=...)` with one of them before `export`. "
            f"Received: {type(sampler).__name__}"
        )
    values = {} if sampler.is_greedy else {**sampler.settings(), "seed": sampler.seed}
    values |= compiled | {"max_batch_size": max_batch_size}
    if max_new_tokens is not None:
        values["max_new_tokens"] = max_new_tokens
    names = ("max_new_tokens", "max_batch_size", "temperature", "seed", *OFF)
    values = {name: values[name] for name in names if values.get(name) is not None}
    for name, value in values.items():
        if np.ndim(value):
            raise ValueError(
                f"`{name}` of a served model must be one value for all prompts: call `compile` "
                f"with a single value before `export`. Received: {name}={value!r}"
            )
        values[name] = np.asarray(value).item()  # NumPy numbers are not valid JSON.
    if "seed" in values:  # as a signed 32-bit integer
        values["seed"] = (values["seed"] + 2**31) % 2**32 - 2**31
    stop_ids = settings.stop_token_ids
    if isinstance(stop_ids, str):
        stop_ids = lm.preprocessor.tokenizer.stop_token_ids
    stop_ids = tuple(np.ravel(np.array(stop_ids, int)).tolist())
    check_stop_token_ids(stop_ids)
    return ServingOptions(**values, stop=settings.stops, stop_token_ids=stop_ids)
