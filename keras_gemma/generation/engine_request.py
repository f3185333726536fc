"""A request to the engine, and what comes back: ids, never text."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal, Protocol

import numpy as np

from keras_gemma.checks import check_integer, check_number
from keras_gemma.config import GemmaConfig
from keras_gemma.generation.samplers.sampler import check_seed
from keras_gemma.generation.stopping import check_stop_token_ids

MAX_TOP_LOGPROBS = 20
"""Maximum number of top log-probabilities per token. One compiled program returns so many."""

MAX_SEQUENCES = 128
"""Maximum number of sequences per request."""

FinishReason = Literal["stop", "length", "cancelled", "error"]


class TokenConstraint(Protocol):
    """Tokens that one sequence may have next, such as those that continue a JSON document."""

    def allowed(self) -> np.ndarray:
        """Returns the allowed tokens as bits, int32 `[ceil(V / 32)]`.

        Bit `i % 32` of word `i // 32` is set if token i is allowed. At least one bit is set.
        """
        ...

    def accept(self, token_id: int) -> None:
        """Adds the chosen token. Stop tokens are not passed."""
        ...


@dataclasses.dataclass(frozen=True)
class EngineRequest:
    """A prompt and how to continue it."""

    prompt: np.ndarray
    """Non-empty token ids, int32 `[T]`."""
    max_new_tokens: int
    """Maximum number of new tokens per sequence, at least 1."""
    temperature: float = 1.0
    """Divisor of the logits; 0 means greedy decoding."""
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    """Random seed. `None` takes a new seed."""
    num_return_sequences: int = 1
    """Number of sequences. The prompt is prefilled once."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end a sequence, and are its last token."""
    repetition_penalty: float = 1.0
    """Factor for tokens in the prompt or the new text (arXiv:1909.05858); 1 disables it."""
    frequency_penalty: float = 0.0
    """Decrease of a token's logit for each time that it is in the new text."""
    presence_penalty: float = 0.0
    """Decrease of a token's logit if it is in the new text."""
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    """Values that are added to logits, by token id."""
    top_logprobs: int | None = None
    """Number of top log-probabilities per token. `None` disables log-probabilities."""
    constraint: Callable[[], TokenConstraint] | None = None
    """Function that returns a new constraint, called once per sequence."""
    cache_salt: str = ""
    """Requests share cached prefixes only with requests of the same salt."""

    def check(self, config: GemmaConfig, max_length: int) -> None:
        """Raises a ValueError if a model of `config` cannot answer the request.

        `max_length` is the maximum number of tokens per sequence, including the prompt.
        """
        check_integer("max_new_tokens", self.max_new_tokens)
        check_integer("num_return_sequences", self.num_return_sequences, 1, MAX_SEQUENCES)
        check_stop_token_ids(self.stop_token_ids)
        check_number("temperature", self.temperature, "[0, 1e9)")
        check_number("repetition_penalty", self.repetition_penalty, "(0, 1e9)")
        for name in ("frequency_penalty", "presence_penalty"):
            check_number(name, getattr(self, name), "(-1e9, 1e9)")
        if self.top_k is not None:
            check_integer("top_k", self.top_k, 1, 2**31 - 1)
        for name in ("top_p", "min_p"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), "(0, 1]")
        if self.seed is not None:
            check_seed(self.seed)
        if self.top_logprobs is not None:
            check_integer("top_logprobs", self.top_logprobs, 0, MAX_TOP_LOGPROBS)
        for token_id, bias in self.logit_bias.items():
            if not 0 <= token_id < config.vocabulary_size:
                raise ValueError(
                    "The ids in `logit_bias` must be in "
                    f"[0, {config.vocabulary_size}). Received: {token_id}"
                )
            check_number("logit_bias", bias, "[-1e9, 1e9]")
        length = len(self.prompt)
        if not length:
            raise ValueError(
                "`prompt` must have at least one token, such as the start token. "
                "Received: no tokens"
            )
        smallest, largest = int(self.prompt.min()), int(self.prompt.max())
        if smallest < 0 or largest >= config.vocabulary_size:
            raise ValueError(
                f"The ids in `prompt` must be in [0, {config.vocabulary_size}). "
                f"Received: ids from {smallest} to {largest}"
            )
        if length + self.max_new_tokens > max_length:
            raise ContextLengthError(
                f"The prompt has {length} tokens and `max_new_tokens` is {self.max_new_tokens}, "
                f"but a sequence may have at most {max_length} tokens in all. Shorten the prompt, "
                "or allow fewer new tokens."
            )


@dataclasses.dataclass(frozen=True)
class EngineOutput:
    """New tokens of one sequence of a request."""

    index: int
    """Number of the sequence, from 0 to `num_return_sequences` - 1."""
    ids: list[int]
    """New tokens since the last output, including a stop token. May be empty at the end."""
    logprobs: np.ndarray | None = None
    """Log-probability of each token, in nats, float32 `[n]`. Those of the model, before penalties,
    constraints and the temperature."""
    top_ids: np.ndarray | None = None
    """Most likely tokens at each position, int32 `[n, top_logprobs]`."""
    top_logprobs: np.ndarray | None = None
    """Log-probabilities of `top_ids`, float32 `[n, top_logprobs]`."""
    finish_reason: FinishReason | None = None
    """`None` until the last output of the sequence."""
    error: Exception | None = None
    """The exception that ended the sequence, if `finish_reason` is `"error"`."""


class ContextLengthError(ValueError):
    """Error of a request with more tokens than the context length."""


class QueueFullError(RuntimeError):
    """Error of a request that finds the queue full. Try again later."""

    retry_after: float = 1.0
    """Seconds after which the queue probably has space."""


class EngineStoppedError(RuntimeError):
    """Error of a request to an engine that is draining, stopped or broken."""
