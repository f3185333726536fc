"""What a served model does where a call says nothing: taken from the `compile` of the model."""

import dataclasses
from typing import Any

import numpy as np

from keras_gemma.generation.request import MOST_STOP_IDS
from keras_gemma.generation.samplers.random import DrawingSampler
from keras_gemma.generation.strategies.verify import is_greedy

OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
"""The value of each filter that leaves all tokens in the running."""

DEFAULT_MAX_NEW_TOKENS = 256

NOT_SERVED = ("repetition_penalty", "logits_processors", "num_return_sequences", "return_logprobs")
"""Settings of `compile` that a served model has not."""


@dataclasses.dataclass(frozen=True)
class ServingOptions:
    """Defaults of a call, and limits."""

    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    temperature: float = 0.0
    top_k: int = OFF["top_k"]
    top_p: float = OFF["top_p"]
    min_p: float = OFF["min_p"]
    seed: int = -1
    """-1 draws another one each time."""
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    max_batch_size: int | None = None


def options_of(lm: Any, max_new_tokens: int | None, max_batch_size: int | None) -> ServingOptions:
    """The options of a `GemmaCausalLM`.

    Raises:
        ValueError: a number out of range, or a model that was compiled with what is not served.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("max_batch_size", max_batch_size)):
        whole = isinstance(value, int) and not isinstance(value, bool)
        if value is not None and (not whole or value < 1):
            raise ValueError(f"`{name}` must be an integer >= 1. Received: {name}={value!r}")
    settings = lm.generation_settings
    sampler = settings.choose_sampler(lm.sampler)
    given = settings.given()
    wrong = [name for name in NOT_SERVED if name in given]
    if wrong:
        raise ValueError(
            f"A served model has no `{wrong[0]}`: call `compile` without it before `export`. "
            f"Received: {wrong[0]}={given[wrong[0]]!r:.80}"
        )
    draws = isinstance(sampler, DrawingSampler) and not sampler.is_own()
    if not draws and not is_greedy(sampler):
        raise ValueError(
            "A served model samples by 'greedy', 'random', 'top_k', 'top_p' or 'min_p': call "
            "`compile(sampler=...)` with one of them before `export`. "
            f"Received: {type(sampler).__name__}"
        )
    values = {**sampler.settings(), "seed": sampler.seed, **given} if draws else {}
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
                f"`{name}` of a served model is one value for all prompts: call `compile` with "
                f"one before `export`. Received: {name}={value!r}"
            )
    values = {name: value for name, value in values.items() if value is not None}
    if "seed" in values:  # as 32 bits with a sign
        values["seed"] = (values["seed"] + 2**31) % 2**32 - 2**31
    stop_ids = settings.stop_token_ids
    if isinstance(stop_ids, str):
        stop_ids = lm.preprocessor.tokenizer.stop_token_ids
    stop_ids = tuple(int(id) for id in np.ravel(np.array(stop_ids, int)))
    if len(stop_ids) > MOST_STOP_IDS:
        raise ValueError(f"`stop_token_ids` takes up to {MOST_STOP_IDS} ids. Received: {stop_ids}")
    return ServingOptions(
        **values, stop=settings.stops, stop_token_ids=stop_ids, max_batch_size=max_batch_size
    )
