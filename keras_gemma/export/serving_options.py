"""Default generation settings of a served model, taken from `compile()`."""

import dataclasses
from typing import Any

import numpy as np

from keras_gemma.checks import check_integer
from keras_gemma.generation.samplers.random import DrawingSampler
from keras_gemma.generation.stopping import MAX_STOP_TOKEN_IDS
from keras_gemma.generation.strategies.verify import is_greedy

OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
"""Value of each filter that disables it."""

DEFAULT_MAX_NEW_TOKENS = 256

UNSUPPORTED_SETTINGS = (
    "repetition_penalty",
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
    seed: int = -1
    """Seed of the sampler; -1 uses a new random seed in each call."""
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    max_batch_size: int | None = None


def options_of(lm: Any, max_new_tokens: int | None, max_batch_size: int | None) -> ServingOptions:
    """Returns the serving options of a `GemmaCausalLM`.

    Raises:
        ValueError: If a number is out of range, or a served model does not support a setting of
            `compile()`.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("max_batch_size", max_batch_size)):
        if value is not None:
            check_integer(name, value)
    settings = lm.generation_settings
    sampler = settings.choose_sampler(lm.sampler)
    compiled = settings.given()
    unsupported = [name for name in UNSUPPORTED_SETTINGS if name in compiled]
    if unsupported:
        name = unsupported[0]
        raise ValueError(
            f"A served model does not support `{name}`: call `compile` without it before `export`. "
            f"Received: {name}={compiled[name]!r:.80}"
        )
    draws = isinstance(sampler, DrawingSampler) and not sampler.is_own()
    if not draws and not is_greedy(sampler):
        raise ValueError(
            "The sampler of a served model must be 'greedy', 'random', 'top_k', 'top_p' or "
            "'min_p': call `compile(sampler=...)` with one of them before `export`. "
            f"Received: {type(sampler).__name__}"
        )
    values = {**sampler.settings(), "seed": sampler.seed, **compiled} if draws else {}
    if max_new_tokens is None:
        max_new_tokens = settings.max_new_tokens
    values = {
        "max_new_tokens": max_new_tokens,
        "temperature": values.get("temperature", 0.0),
        "seed": settings.seed if settings.seed is not None else values.get("seed"),
        **{name: values.get(name) for name in OFF},
    }
    for name, value in values.items():
        if np.ndim(value):
            raise ValueError(
                f"`{name}` of a served model must be one value for all prompts: call `compile` "
                f"with a single value before `export`. Received: {name}={value!r}"
            )
    values["max_batch_size"] = max_batch_size
    for name in ("max_new_tokens", "max_batch_size"):  # NumPy integers are not valid JSON
        values[name] = None if values[name] is None else int(values[name])
    values = {name: value for name, value in values.items() if value is not None}
    if "seed" in values:  # as a signed 32-bit integer
        values["seed"] = (values["seed"] + 2**31) % 2**32 - 2**31
    stop_ids = settings.stop_token_ids
    if isinstance(stop_ids, str):
        stop_ids = lm.preprocessor.tokenizer.stop_token_ids
    stop_ids = tuple(int(id) for id in np.ravel(np.array(stop_ids, int)))
    if len(stop_ids) > MAX_STOP_TOKEN_IDS:
        raise ValueError(
            f"`stop_token_ids` may have at most {MAX_STOP_TOKEN_IDS} ids. Received: {stop_ids}"
        )
    return ServingOptions(**values, stop=settings.stops, stop_token_ids=stop_ids)
