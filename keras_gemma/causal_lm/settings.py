"""Everything that can be set for a text: at `compile`, and in a call."""

import dataclasses
import difflib
import inspect
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any

import keras
import numpy as np

from keras_gemma.generation import samplers
from keras_gemma.generation.samplers.override import override
from keras_gemma.generation.samplers.sampler import (
    Numbers,
    Seeds,
    check_numbers,
    check_rows,
    check_seed,
)
from keras_gemma.generation.strategies.verify import is_greedy

FILTERS = ("temperature", "top_k", "top_p", "min_p")
"""What `override` changes in a sampler."""

MOST_TOP_LOG_PROBABILITIES = 64


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """The settings of a generation; None leaves one as it was compiled, or as it is by default.

    Where a list is named, it holds one value for each prompt.

    Args:
        max_new_tokens: the most new tokens of a row; an integer, or a list.
        max_length: the most tokens of a row, prompt included, in the place of `max_new_tokens`;
            by default the preprocessor's `sequence_length`.
        sampler: a name, or a `samplers.Sampler`, also of KerasHub.
        temperature: divides the logits; 0 is greedy. A number, or a list. With a greedy sampler
            it asks for a random one, as the next three do.
        top_k: draw among the so many likeliest alone; an integer, or a list.
        top_p: among the fewest that together have this probability; a number, or a list.
        min_p: among those with this share of the likeliest one's; a number, or a list.
        repetition_penalty: above 1, tokens that are in the text already get less likely
            (arXiv:1909.05858); a number, or a list.
        seed: an integer makes the call repeat, whatever batch a prompt stands in; or a list.
        stop: a string, or strings, that end a text; they are not part of it.
        stop_token_ids: ids that end a row; None: none. `"auto"`: those that were compiled, else
            `<eos>` and `<end_of_turn>`.
        num_return_sequences: texts for each prompt.
        logits_processors: functions `(ids int32 [B, S], logits float32 [B, V]) -> logits`, in
            `keras.ops` alone, compiled; ids are -1 behind each row's text. A new function
            compiles anew.
        return_logprobs: True notes the log-probability of each token, an integer those of the so
            many likeliest too; `generate` then returns `Completion`s.

    Raises:
        ValueError: a value out of range, or settings that exclude each other.
    """

    max_new_tokens: int | Sequence[int] | None = None
    max_length: int | None = None
    sampler: Any = None
    temperature: Numbers | None = None
    top_k: int | Sequence[int] | None = None
    top_p: Numbers | None = None
    min_p: Numbers | None = None
    repetition_penalty: Numbers | None = None
    seed: Seeds = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Any = "auto"
    num_return_sequences: int | None = None
    logits_processors: Sequence[Callable[[Any, Any], Any]] | None = None
    return_logprobs: bool | int | None = None

    def __post_init__(self) -> None:
        if self.stop_token_ids is None:  # which stands for "as it was compiled" in all others
            object.__setattr__(self, "stop_token_ids", ())
        if self.max_length is not None and self.max_new_tokens is not None:
            raise ValueError(
                "Give `max_length` (prompt included) or `max_new_tokens`, not both. Received: "
                f"max_length={self.max_length}, max_new_tokens={self.max_new_tokens}"
            )
        for name in ("max_length", "num_return_sequences"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not _is_positive(value)):
                raise ValueError(f"`{name}` must be an integer >= 1. Received: {name}={value!r}")
        if self.max_new_tokens is not None:
            check_numbers(
                "max_new_tokens",
                self.max_new_tokens,
                "an integer >= 1",
                lambda value: value >= 1,
                whole=True,
            )
        if self.repetition_penalty is not None:
            check_numbers(
                "repetition_penalty",
                self.repetition_penalty,
                "a number > 0",
                lambda value: 0 < value < 1e9,
            )
        if self.seed is not None:
            check_seed(self.seed)
        if self.stop is not None and not isinstance(self.stop, Collection):
            raise TypeError(
                "`stop` must be a string, or a list of strings, that are not empty. "
                f"Received: stop={self.stop!r}"
            )
        for stop in self.stops:
            if not isinstance(stop, str) or not stop:
                raise ValueError(
                    "`stop` must be a string, or a list of strings, that are not empty. "
                    f"Received: stop={self.stop!r}"
                )
        if self.logits_processors is not None and not (
            isinstance(self.logits_processors, Collection)
            and all(callable(processor) for processor in self.logits_processors)
        ):
            raise TypeError(
                "`logits_processors` must be a list of functions (ids, logits) -> logits. "
                f"Received: logits_processors={self.logits_processors!r}"
            )
        count = self.return_logprobs
        if count is not None and not (
            isinstance(count, int | np.integer) and 0 <= count <= MOST_TOP_LOG_PROBABILITIES
        ):
            raise ValueError(
                "`return_logprobs` must be True, False, or how many of the likeliest tokens to "
                f"note, up to {MOST_TOP_LOG_PROBABILITIES}. Received: return_logprobs={count!r}"
            )
        self.choose_sampler("greedy", self.sampler)  # raises what is wrong with the filters alone
        filters = [name for name in FILTERS if getattr(self, name) is not None]
        if filters and self.sampler is not None and is_greedy(samplers.get(self.sampler)):
            raise ValueError(
                f"A greedy sampler has no use for `{'`, `'.join(filters)}`. Leave out one of "
                f"them. Received: sampler={self.sampler!r}"
            )

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def processors(self) -> tuple[Callable[[Any, Any], Any], ...]:
        """The functions that change logits."""
        return tuple(self.logits_processors or ())

    @property
    def top_log_probabilities(self) -> int | None:
        """How many of the likeliest tokens to note; None for no log-probabilities at all."""
        if self.return_logprobs is None or self.return_logprobs is False:
            return None
        return 0 if self.return_logprobs is True else int(self.return_logprobs)

    def choose_sampler(self, compiled: Any, sampler: Any = None) -> samplers.Sampler:
        """The sampler of a call.

        Args:
            compiled: what `compile` was given.
            sampler: what takes its place, if it is not None.
        """
        chosen = samplers.get(compiled if sampler is None else sampler)
        given = {name: getattr(self, name) for name in FILTERS}
        return override(chosen, {k: v for k, v in given.items() if v is not None})

    def serialize(self) -> dict[str, Any]:
        """The settings that say something, as JSON can hold them.

        Of the logits processors those alone that can be had back: functions and classes that are
        registered with Keras. A warning names the others.
        """
        given = self.given()
        kept = [processor for processor in self.processors if _is_registered(processor)]
        lost = [processor for processor in self.processors if not _is_registered(processor)]
        if lost:
            warnings.warn(
                f"`logits_processors` that are not registered with Keras are not saved: {lost}. "
                "Register them with `keras.saving.register_keras_serializable`, or compile again "
                "with them when the model is loaded.",
                stacklevel=2,
            )
            given |= {"logits_processors": kept}
        if not kept:
            given.pop("logits_processors", None)
        return {name: keras.saving.serialize_keras_object(value) for name, value in given.items()}

    def given(self) -> dict[str, Any]:
        """The settings that say something, by name."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        stops = given["stop_token_ids"]
        if isinstance(stops, str) and stops == "auto":
            del given["stop_token_ids"]
        return given

    def over(self, compiled: "GenerationSettings") -> "GenerationSettings":
        """These settings, and for what they leave open those of `compiled`."""
        given = self.given()
        if "sampler" in given:  # the filters of another sampler do not belong to this one
            compiled = dataclasses.replace(compiled, **dict.fromkeys(FILTERS))
        if "max_length" in given or "max_new_tokens" in given:
            compiled = dataclasses.replace(compiled, max_length=None, max_new_tokens=None)
        return dataclasses.replace(compiled, **given)

    def check_rows(self, prompts: int) -> None:
        """Raise a ValueError where a list has another length than there are prompts."""
        for name in ("max_new_tokens", "repetition_penalty", "seed", *FILTERS):
            check_rows(name, getattr(self, name), prompts)

    def room(self, lengths: list[int], default_length: int | None) -> list[int]:
        """The most new tokens of each row.

        Args:
            lengths: of the prompts.
            default_length: the length of a row where nothing is set.
        """
        if self.max_new_tokens is not None:
            return [int(most) for most in np.broadcast_to(self.max_new_tokens, len(lengths))]
        longest = default_length if self.max_length is None else self.max_length
        for i, length in enumerate(lengths):
            if length >= longest:
                raise ValueError(
                    f"Prompt {i} has {length} tokens, which leaves no room to generate "
                    f"within max_length={longest}. Pass a larger `max_length`, or "
                    "`max_new_tokens`, or a shorter prompt."
                )
        return [longest - length for length in lengths]


def read_settings(arguments: dict[str, Any], caller: str) -> GenerationSettings:
    """The settings of a call, or a TypeError that names a misspelt one.

    Args:
        arguments: by name.
        caller: whose arguments they are.
    """
    names = [field.name for field in dataclasses.fields(GenerationSettings)]
    for name in arguments:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            hint = f" Did you mean `{near[0]}`?" if near else f" There are: {', '.join(names)}."
            raise TypeError(f"`{caller}` has no argument `{name}`.{hint}")
    return GenerationSettings(**arguments)


def _is_registered(processor: Any) -> bool:
    """Whether Keras can write a function, or an object, down and make it again."""
    maker = processor if inspect.isfunction(processor) else type(processor)
    has_config = maker is processor or hasattr(processor, "get_config")
    name = keras.saving.get_registered_name(maker)
    return has_config and keras.saving.get_registered_object(name) is maker


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | np.integer) and value >= 1
