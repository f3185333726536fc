"""Generation settings, as passed to `compile` or to one call."""

import dataclasses
import inspect
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any

import keras
import numpy as np

from keras_gemma.checks import check_argument_names, check_integer, check_numbers
from keras_gemma.generation import samplers
from keras_gemma.generation.samplers.override import override
from keras_gemma.generation.samplers.random import FILTERS
from keras_gemma.generation.samplers.sampler import (
    Numbers,
    Seeds,
    check_rows,
    check_seed,
)
from keras_gemma.text.grammar import read_response_format

SAMPLER_SETTINGS = ("temperature", *FILTERS)
"""Settings that override fields of the sampler."""

STOP_ERROR = "`stop` must be a non-empty string or a list of non-empty strings"

MAX_TOP_LOGPROBS = 64
"""Maximum number of top-k log-probabilities per generated token."""


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """Settings of text generation.

    `None` uses the value passed to `compile()`, or the default if none was passed. Lists have one
    value per prompt.

    Args:
        max_new_tokens: Maximum number of new tokens per sequence. An integer, or a list.
        max_length: Maximum number of tokens per sequence, including the prompt. Excludes
            `max_new_tokens`. Defaults to the preprocessor's `sequence_length`.
        sampler: A sampler name or a `samplers.Sampler`. KerasHub samplers are accepted.
        temperature: Divisor of the logits; 0 means greedy decoding. A number, or a list. With
            a greedy sampler, `temperature`, `top_k`, `top_p` and `min_p` switch to random sampling.
        top_k: Number of most likely tokens to sample from. An integer, or a list.
        top_p: Nucleus sampling: samples from the smallest set of tokens with at least this total
            probability. A number, or a list.
        min_p: Minimum probability of a token, relative to the most likely one. A number, or a
            list.
        repetition_penalty: Values above 1 make tokens less likely if the text already contains
            them (arXiv:1909.05858). A number, or a list.
        frequency_penalty: Value that is subtracted from the logit of a token for each time that it
            is in the new text. A number, or a list.
        presence_penalty: Value that is subtracted once, if the token is in the new text. A number,
            or a list.
        seed: Random seed. The same seed gives the same text, whatever the rest of the batch. An
            integer, or a list.
        stop: A stop string, or a list of them. The returned text ends before the stop string.
        stop_token_ids: Token ids that stop generation. `None` disables stop tokens. `"auto"` uses
            the ids passed to `compile()`, or `<eos>` and `<end_of_turn>` if none were passed.
        num_return_sequences: Number of sequences per prompt. Defaults to 1.
        logits_processors: Functions `(ids int32 [B, S], logits float32 [B, V]) -> logits`. They
            are compiled, so they may only use `keras.ops`. Ids are -1 after the end of each
            sequence. Each new function triggers a compilation.
        response_format: Format of the new text, as in OpenAI's API: `{"type": "json_object"}`,
            `{"type": "json_schema", "json_schema": {"schema": ...}}`, `{"type": "regex", "regex":
            ...}`, `{"type": "lark", "grammar": ...}`, `{"type": "choice", "choices": [...]}` or
            `{"type": "text"}`. A JSON schema and a class of pydantic are accepted too. Needs the
            extra `serve`.
        return_logprobs: If True, `generate` returns `Completion` objects with the log-probability
            of each new token. An integer adds this many top log-probabilities per token.

    Raises:
        ValueError: If a value is out of range or two settings exclude each other.
        TypeError: If `stop`, `logits_processors` or `response_format` has the wrong type.
    """

    max_new_tokens: int | Sequence[int] | None = None
    max_length: int | None = None
    sampler: Any = None
    temperature: Numbers | None = None
    top_k: int | Sequence[int] | None = None
    top_p: Numbers | None = None
    min_p: Numbers | None = None
    repetition_penalty: Numbers | None = None
    frequency_penalty: Numbers | None = None
    presence_penalty: Numbers | None = None
    seed: Seeds = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Any = "auto"
    num_return_sequences: int | None = None
    logits_processors: Sequence[Callable[[Any, Any], Any]] | None = None
    response_format: Any = None
    return_logprobs: bool | int | None = None

    def __post_init__(self) -> None:
        if self.stop_token_ids is None:  # In all other fields, None means "as passed to `compile`".
            object.__setattr__(self, "stop_token_ids", ())
        if self.max_length is not None and self.max_new_tokens is not None:
            raise ValueError(
                "Pass `max_length` (prompt included) or `max_new_tokens`, not both. Received: "
                f"max_length={self.max_length}, max_new_tokens={self.max_new_tokens}"
            )
        for name in ("max_length", "num_return_sequences"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name))
        if self.max_new_tokens is not None:
            check_numbers("max_new_tokens", self.max_new_tokens, "[1, inf)", whole=True)
        if self.repetition_penalty is not None:
            check_numbers("repetition_penalty", self.repetition_penalty, "(0, 1e9)")
        for name in ("frequency_penalty", "presence_penalty"):
            if getattr(self, name) is not None:
                check_numbers(name, getattr(self, name), "(-1e9, 1e9)")
        if self.response_format is not None:
            response_format = read_response_format(self.response_format)
            object.__setattr__(self, "response_format", response_format)
        check_seed(self.seed)
        if self.stop is not None and not isinstance(self.stop, Collection):
            raise TypeError(f"{STOP_ERROR}. Received: stop={self.stop!r}")
        if not all(isinstance(stop, str) and stop for stop in self.stops):
            raise ValueError(f"{STOP_ERROR}. Received: stop={self.stop!r}")
        if self.logits_processors is not None and not (
            isinstance(self.logits_processors, Collection)
            and all(callable(processor) for processor in self.logits_processors)
        ):
            raise TypeError(
                "`logits_processors` must be a list of functions (ids, logits) -> logits. "
                f"Received: logits_processors={self.logits_processors!r}"
            )
        count = self.return_logprobs
        if count is not None and not isinstance(count, bool):
            advice = "True and False are valid too."
            check_integer("return_logprobs", count, 0, MAX_TOP_LOGPROBS, advice)
        self.choose_sampler("greedy", self.sampler)  # checks their values
        overrides = self.sampler_settings()
        if overrides and self.sampler is not None and samplers.get(self.sampler).is_greedy:
            raise ValueError(
                f"A greedy sampler does not use `{'`, `'.join(overrides)}`. Pass another sampler, "
                f"or leave it out. Received: sampler={self.sampler!r}"
            )

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings, as a tuple."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def processors(self) -> tuple[Callable[[Any, Any], Any], ...]:
        """Logits processors, as a tuple."""
        return tuple(self.logits_processors or ())

    @property
    def top_logprobs(self) -> int | None:
        """Number of top log-probabilities per token. `None` disables log-probabilities."""
        if self.return_logprobs is None or self.return_logprobs is False:
            return None
        return 0 if self.return_logprobs is True else int(self.return_logprobs)

    def choose_sampler(self, compiled: Any, sampler: Any = None) -> samplers.Sampler:
        """Returns the sampler of a call, with the settings that override its fields.

        Args:
            compiled: Sampler passed to `compile`.
            sampler: Sampler passed to the call. `None` uses `compiled`.
        """
        chosen = samplers.get(compiled if sampler is None else sampler)
        return override(chosen, self.sampler_settings())

    def sampler_settings(self) -> dict[str, Any]:
        """Returns the explicit settings that override fields of the sampler, by name."""
        values = {name: getattr(self, name) for name in SAMPLER_SETTINGS}
        return {name: value for name, value in values.items() if value is not None}

    def serialize(self) -> dict[str, Any]:
        """Returns the explicit settings in a JSON-serializable form.

        Only logits processors that are registered with Keras are included. A warning names the
        others.
        """
        settings = self.explicit_settings()
        registered = [processor for processor in self.processors if _is_registered(processor)]
        unregistered = [processor for processor in self.processors if not _is_registered(processor)]
        if unregistered:
            warnings.warn(
                "`logits_processors` that are not registered with Keras are not saved: "
                f"{unregistered}. Register them with "
                "`keras.saving.register_keras_serializable`, or compile again with them after "
                "loading the model.",
                stacklevel=2,
            )
            settings |= {"logits_processors": registered}
        if not registered:
            settings.pop("logits_processors", None)
        return {
            name: keras.saving.serialize_keras_object(value) for name, value in settings.items()
        }

    def explicit_settings(self) -> dict[str, Any]:
        """Returns the settings that were set explicitly, by name."""
        settings = {name: value for name, value in vars(self).items() if value is not None}
        stop_token_ids = settings["stop_token_ids"]
        if isinstance(stop_token_ids, str) and stop_token_ids == "auto":
            del settings["stop_token_ids"]
        return settings

    def with_defaults(self, compiled: "GenerationSettings") -> "GenerationSettings":
        """Returns these settings, filled up with those of `compiled`."""
        settings = self.explicit_settings()
        if "sampler" in settings:  # The compiled settings belong to the compiled sampler.
            compiled = dataclasses.replace(compiled, **dict.fromkeys(SAMPLER_SETTINGS))
        if "max_length" in settings or "max_new_tokens" in settings:
            compiled = dataclasses.replace(compiled, max_length=None, max_new_tokens=None)
        return dataclasses.replace(compiled, **settings)

    def check_rows(self, prompts: int) -> None:
        """Raises a ValueError if the length of a list differs from the number of prompts."""
        penalties = ("repetition_penalty", "frequency_penalty", "presence_penalty")
        for name in ("max_new_tokens", *penalties, "seed", *SAMPLER_SETTINGS):
            check_rows(name, getattr(self, name), prompts)

    def max_new_tokens_of(self, lengths: list[int], default_length: int | None) -> list[int]:
        """Returns the maximum number of new tokens of each sequence.

        Args:
            lengths: Prompt lengths, in tokens.
            default_length: Sequence length if neither `max_new_tokens` nor `max_length` is set.
        """
        if self.max_new_tokens is not None:
            return [int(count) for count in np.broadcast_to(self.max_new_tokens, len(lengths))]
        max_length = default_length if self.max_length is None else self.max_length
        for i, length in enumerate(lengths):
            if length >= max_length:
                raise ValueError(
                    f"Prompt {i} has {length} tokens, which leaves no room to generate "
                    f"within max_length={max_length}. Pass a larger `max_length`, or "
                    "`max_new_tokens`, or a shorter prompt."
                )
        return [max_length - length for length in lengths]


def read_settings(arguments: dict[str, Any], caller: str) -> GenerationSettings:
    """Returns the settings of a call.

    Args:
        arguments: Keyword arguments of the call.
        caller: Name of the called method, for error messages.

    Raises:
        TypeError: If an argument is unknown. The message suggests the closest name.
    """
    names = [field.name for field in dataclasses.fields(GenerationSettings)]
    check_argument_names(caller, arguments, names)
    return GenerationSettings(**arguments)


def _is_registered(processor: Any) -> bool:
    """Returns True if Keras can serialize and deserialize the function or object."""
    target = processor if inspect.isfunction(processor) else type(processor)
    has_config = target is processor or hasattr(processor, "get_config")
    name = keras.saving.get_registered_name(target)
    return has_config and keras.saving.get_registered_object(name) is target
