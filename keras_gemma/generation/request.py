"""What is asked of a generator, and what it gives: ids, and no text."""

import dataclasses
from typing import Any

import numpy as np
from keras import ops

from keras_gemma.config import GemmaConfig
from keras_gemma.generation.samplers import Sampler
from keras_gemma.generation.samplers.sampler import LogitsProcessor, Numbers, Seeds
from keras_gemma.model.backbone import GemmaBackbone
from keras_gemma.model.cache import Cache

MOST_STOP_IDS = 8

MOST_GUESSES = 32
"""Of a draft at a time: each is a part of the compiled program."""


@dataclasses.dataclass(frozen=True)
class Prefix:
    """The beginning of a text, read: later texts that begin with it go on from there.

    Of the model that read it, and of its weights as they were: another model is refused, and so
    are weights whose last norm has changed, as by `load_weights` and mostly by `fit`. Changes that
    leave it as it was cannot be told cheaply: read the text again after any.
    """

    ids: np.ndarray
    """int32 `[n]`."""
    cache: Cache
    """Keys and values `[1, S, K, H]` of each layer, by position; S is at least n."""
    reader: Any = None
    """A weak reference to the backbone that read it."""
    weights: bytes = b""
    """Its `mark_of` then."""
    fewest: int = 0
    """Of its tokens, how many a text must begin with: local layers may have given up what those
    at the end do not see, and then fewer are no use."""

    def is_of(self, backbone: GemmaBackbone) -> bool:
        """Whether `backbone` read it, with the weights that it has now."""
        reader = None if self.reader is None else self.reader()
        return reader is backbone and self.weights == mark_of(backbone)

    def check(self, backbone: GemmaBackbone) -> None:
        """Raise a ValueError where it was not read by `backbone`, or with other weights."""
        if self.reader is None or self.reader() is not backbone:
            raise ValueError(
                "`prefix` was read by another model, whose keys and values mean nothing to this "
                "one. Call `prefill` of the model that generates."
            )
        if self.weights != mark_of(backbone):
            raise ValueError(
                "`prefix` was read with other weights than the model has now: they have been "
                "trained, loaded or converted since. Call `prefill` again."
            )

    def shared_with(self, prompts: list[np.ndarray]) -> int:
        """How many tokens every prompt begins with; one of each prompt is always left to read.

        0 where those are fewer than can be used.
        """
        shared = len(self.ids)
        for prompt in prompts:
            length = min(shared, len(prompt) - 1)
            differ = np.flatnonzero(self.ids[:length] != prompt[:length])
            shared = int(differ[0]) if len(differ) else length
        return shared if shared >= self.fewest else 0


def mark_of(backbone: GemmaBackbone) -> bytes:
    """What tells most changes of the weights at little cost.

    All layouts, the last norm, which adapter is on, and what it adds to its last matrix.
    """
    layouts = [f"{tuple(weight.shape)} {weight.dtype}" for weight in backbone.weights]
    layouts.append(f"{backbone.adapters.active} {backbone.adapters.merged}")
    seen = [backbone.layer_norm.scale]
    if backbone.adapters.active is not None:
        *_, linear = backbone.adapters.linears(backbone.adapters.active).values()
        seen.append(linear.low_ranks[backbone.adapters.active].b)
    numbers = [ops.convert_to_numpy(ops.cast(variable.value, "float32")) for variable in seen]
    return "\n".join(layouts).encode() + b"".join(array.tobytes() for array in numbers)


@dataclasses.dataclass(frozen=True)
class Draft:
    """Who guesses tokens, which the model then reads at once instead of one by one."""

    tokens: int
    """How many are guessed at a time, at least 1."""
    generator: Any = None
    """`Programs` of a smaller model. `None` looks up continuations in the text itself."""
    tokenizer: Any = None
    """What the smaller model's ids stand for, where it has a tokenizer; not looked at here."""

    def check(self, config: GemmaConfig, longest: int, sampler: Sampler) -> None:
        """Raise a ValueError where it cannot guess for a model of `config`.

        Args:
            longest: the most tokens that a text may have.
        """
        whole = isinstance(self.tokens, int) and not isinstance(self.tokens, bool)
        if not whole or not 1 <= self.tokens <= MOST_GUESSES:
            raise ValueError(
                f"`num_draft_tokens` must be an integer from 1 to {MOST_GUESSES}. "
                f"Received: num_draft_tokens={self.tokens!r}"
            )
        rule = sampler.structure()
        if rule != "greedy" and not (isinstance(rule, tuple) and rule[0] == "draw"):
            raise ValueError(
                "`draft` needs a rule whose probabilities are known: 'greedy', 'random', 'top_k', "
                "'top_p' or 'min_p'. Leave out `draft`, or pass one of them as `sampler`. "
                f"Received: {type(sampler).__name__}"
            )
        if self.generator is None:
            return
        other = self.generator.config
        if other.vocabulary_size != config.vocabulary_size:
            raise ValueError(
                "`draft` must have the vocabulary of the model that it guesses for, of "
                f"{config.vocabulary_size} tokens. Received: one of {other.vocabulary_size}. "
                "Pass a model of the same family, or draft='prompt'."
            )
        if other.context_length < longest:
            raise ValueError(
                f"`draft` reads texts of up to {other.context_length} tokens, and these may have "
                f"{longest}. Change `max_length` or `max_new_tokens`, or pass draft='prompt'."
            )


@dataclasses.dataclass(frozen=True)
class Request:
    """Prompts and how to continue them."""

    prompts: list[np.ndarray]
    """int32 `[T]` each, of any length from 1 on, ids of the vocabulary."""
    room: list[int]
    """The most tokens that each row may get, at least 1."""
    sampler: Sampler
    stop_ids: tuple[int, ...] = ()
    """Ids that end a row; the one that does is its last."""
    seed: Seeds = None
    """Instead of the sampler's own."""
    copies: int = 1
    """Rows for each prompt."""
    repetition_penalty: Numbers | None = None
    processors: tuple[LogitsProcessor, ...] = ()
    top_log_probabilities: int | None = None
    """How many of the likeliest tokens to note down at each place; None notes nothing."""
    prefix: Prefix | None = None
    draft: Draft | None = None

    def check(self, config: GemmaConfig) -> None:
        """Raise a ValueError where the model cannot do what is asked."""
        context = config.context_length
        if not self.prompts:
            raise ValueError("There must be a prompt to continue. Received: an empty list")
        if len(self.stop_ids) > MOST_STOP_IDS:
            raise ValueError(
                f"`stop_token_ids` takes up to {MOST_STOP_IDS} ids. Received: {self.stop_ids}"
            )
        for i, (prompt, most) in enumerate(zip(self.prompts, self.room, strict=True)):
            if not len(prompt):
                raise ValueError(
                    f"Prompt {i} has no tokens. Give it at least one, such as the start token."
                )
            if len(prompt) >= context:
                raise ValueError(
                    f"Prompt {i} has {len(prompt)} tokens, and the model's context holds "
                    f"{context}, one to generate among them. Shorten the prompt."
                )
            if most < 1 or len(prompt) + most > context:
                raise ValueError(
                    f"Prompt {i} has {len(prompt)} tokens and {most} are to follow; there must be "
                    f"at least one, and together no more than the context's {context}. Change "
                    "`max_length` or `max_new_tokens`."
                )

        if self.draft is not None:
            pairs = zip(self.prompts, self.room, strict=True)
            self.draft.check(
                config, max(len(prompt) + most for prompt, most in pairs), self.sampler
            )

    def tokens_to_read(self) -> int:
        """Of all prompts together, what `prefix` does not hold."""
        held = 0 if self.prefix is None else self.prefix.shared_with(self.prompts)
        return sum(len(prompt) - held for prompt in self.prompts)

    def copy_numbers(self) -> np.ndarray:
        """Which copy of its prompt and seed each row is, int32 `[B]`: such rows differ by it alone.

        So a row's random numbers do not depend on the batch it stands in.
        """
        seeds = self.sampler.seed if self.seed is None else self.seed
        seeds = np.ravel(np.array(seeds, object))
        rows = len(self.prompts) * self.copies
        met: dict[Any, int] = {}
        numbers = []
        for row in range(rows):
            seed = seeds[row * len(seeds) // rows]
            prompt = self.prompts[row // self.copies].tobytes()
            key = prompt, None if seed is None else int(seed) % 2**32
            numbers.append(met.get(key, 0))
            met[key] = numbers[-1] + 1
        return np.array(numbers, "int32")


@dataclasses.dataclass(frozen=True)
class Row:
    """What one row got."""

    ids: np.ndarray
    """int32 `[n]`, the new tokens."""
    stopped: bool
    """Whether a stop id ended it, and not its room."""
    log_probabilities: np.ndarray | None = None
    """float32 `[n]`, of the new tokens, in nats."""
    top_ids: np.ndarray | None = None
    """int32 `[n, k]`, the k likeliest tokens at each place."""
    top_log_probabilities: np.ndarray | None = None
    """float32 `[n, k]`."""
    acceptance_rate: float | None = None
    """Of the guesses of a draft that were looked at, the share that became the text."""
    score: float | None = None
    """What beam search compared it by."""


def stop_array(stop_ids: tuple[int, ...]) -> Any:
    """`stop_ids` in the one shape that programs take."""
    stops = np.full(MOST_STOP_IDS, -1, "int32")
    stops[: len(stop_ids)] = stop_ids
    return stops
