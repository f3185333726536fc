"""One decode step: feeds the last token of each row and chooses the next one.

The step handles stop tokens and output, and the sampler chooses. Neither knows what a token means.
"""

from typing import Any, NamedTuple

from keras import ops

from keras_gemma.config import GemmaConfig
from keras_gemma.generation.penalties import penalize
from keras_gemma.generation.samplers import Sampler
from keras_gemma.generation.samplers.sampler import LogitsProcessor
from keras_gemma.generation.stopping import is_stop_token
from keras_gemma.generation.token_mask import apply_token_mask
from keras_gemma.model.cache import Cache, grow_cache, resize
from keras_gemma.model.transformer import EAGER, BlockFunctions, forward_with_cache


class Logprobs(NamedTuple):
    """Log-probabilities of the model, in nats, before logits processors. Indexed by position."""

    chosen: Any  # float32 [B, S]: of the tokens in the text
    top_ids: Any  # int32 [B, S, n]: the top-n tokens
    top: Any  # float32 [B, S, n]: of the top-n tokens


class DecodeState(NamedTuple):
    """Everything that changes from one decode step to the next."""

    text: Any  # int32 [B, S]: prompt and new tokens, then -1
    length: Any  # int32 [B]: tokens of each row; the last one is not in the cache yet
    end: Any  # int32 [B]: maximum length of each row
    stop_token_ids: Any  # int32 [8]: from `stop_array`
    done: Any  # bool [B]: True for finished rows
    cache: Cache  # keys and values [B, R, K, H] of each layer
    sampler: dict[str, Any]  # settings and random state of the sampler
    seen: Any = None  # bool [B, V]: tokens in the text; None without repetition penalty
    penalty: Any = None  # float32 [B]: repetition penalty
    logprobs: Logprobs | None = None
    directions: Any = None  # float32 [B, S, 1, D]: normalized hidden states (contrastive search)
    logits: Any = None  # float32 [B, V]: of the next token (contrastive search)
    counts: Any = None  # int32 [B, V]: new tokens; None without the next two penalties
    frequency: Any = None  # float32 [B]: frequency penalty
    presence: Any = None  # float32 [B]: presence penalty
    allowed: Any = None  # int32 [B, ceil(V / 32)]: bits of the allowed tokens; None allows all

    def grow(self, capacity: int, slots: list[int]) -> "DecodeState":
        """Returns the state with space for `capacity` tokens, and `slots` cache slots per layer."""
        logprobs, directions = self.logprobs, self.directions
        if logprobs is not None:
            logprobs = Logprobs(*(resize(array, capacity) for array in logprobs))
        if directions is not None:
            directions = resize(directions, capacity)
        missing = capacity - self.text.shape[1]
        return self._replace(
            text=ops.pad(self.text, [(0, 0), (0, missing)], constant_values=-1),
            cache=grow_cache(self.cache, slots),
            logprobs=logprobs,
            directions=directions,
        )


def next_logits(
    weights: dict[str, Any],
    state: DecodeState,
    config: GemmaConfig,
    functions: BlockFunctions = EAGER,
) -> tuple[Any, DecodeState]:
    """Feeds the last token of each row. Returns the logits of the next one, float32 `[B, V]`, and
    the state with the updated cache."""
    position = (state.length - 1)[:, None]
    token = ops.take_along_axis(state.text, position, axis=1)
    x, cache = forward_with_cache(weights, token, position, state.cache, config, functions)
    return functions.head(x[:, 0], weights["head"], config), state._replace(cache=cache)


def append_tokens(
    state: DecodeState,
    logits: Any,
    sampler: Sampler,
    processors: tuple[LogitsProcessor, ...] = (),
) -> DecodeState:
    """Chooses the next token of each unfinished row from `logits [B, V]`, and appends it."""
    processed = apply_logits_processors(logits, state, processors)
    if state.allowed is not None:
        processed = apply_token_mask(processed, state.allowed)
    ids, sampler_state = sampler.choose_next(processed, state.sampler)
    return write_tokens(state._replace(sampler=sampler_state), logits, ids)


def write_tokens(state: DecodeState, logits: Any, ids: Any) -> DecodeState:
    """Appends the chosen `ids [B]` to the unfinished rows, and records their log-probabilities from
    the model's `logits [B, V]`."""
    unfinished = ops.logical_not(state.done)
    is_new = ops.logical_and(positions_of(state) == state.length[:, None], unfinished[:, None])
    length = state.length + ops.cast(unfinished, "int32")
    ended = ops.logical_or(is_stop_token(ids, state.stop_token_ids), length >= state.end)
    seen, counts = state.seen, state.counts
    if seen is not None or counts is not None:
        is_chosen = ops.arange(logits.shape[-1], dtype="int32")[None] == ids[:, None]
        if seen is not None:
            seen = ops.logical_or(seen, is_chosen)
        if counts is not None:
            is_counted = ops.logical_and(is_chosen, unfinished[:, None])
            counts = counts + ops.cast(is_counted, "int32")
    return state._replace(
        text=ops.where(is_new, ids[:, None], state.text),
        length=length,
        done=ops.logical_or(state.done, ended),
        seen=seen,
        counts=counts,
        logprobs=record_logprobs(state.logprobs, logits, ids, is_new),
    )


def positions_of(state: DecodeState) -> Any:
    """Returns the positions of the text, int32 `[1, S]`."""
    return ops.arange(ops.shape(state.text)[1], dtype="int32")[None]


def apply_logits_processors(
    logits: Any, state: DecodeState, processors: tuple[LogitsProcessor, ...]
) -> Any:
    """Applies the penalties, then the logits processors of the request."""
    logits = penalize(
        logits, state.seen, state.penalty, state.counts, state.frequency, state.presence
    )
    for processor in processors:
        expected, processed = tuple(logits.shape), processor(state.text, logits)
        shape = tuple(processed.shape) if hasattr(processed, "shape") else f"{processed!r:.80}"
        if shape != expected:
            name = getattr(processor, "__name__", type(processor).__name__)
            raise ValueError(
                f"`logits_processors`: {name} must return logits of the shape of its input, "
                f"{expected}. Received: {shape}"
            )
        logits = ops.cast(processed, "float32")
    return logits


def record_logprobs(logprobs: Logprobs | None, logits: Any, ids: Any, is_new: Any) -> Any:
    """Returns `logprobs` with those of `ids [B]` written at `is_new`, bool `[B, S]`."""
    if logprobs is None:
        return None
    logits = logits - ops.logsumexp(logits, axis=-1, keepdims=True)
    chosen = ops.take_along_axis(logits, ids[:, None], axis=1)
    chosen = ops.where(is_new, chosen, logprobs.chosen)
    count = logprobs.top.shape[-1]
    if not count:
        return logprobs._replace(chosen=chosen)
    top, top_ids = ops.top_k(logits, count)
    is_new = is_new[:, :, None]
    return Logprobs(
        chosen=chosen,
        top_ids=ops.where(is_new, ops.cast(top_ids, "int32")[:, None], logprobs.top_ids),
        top=ops.where(is_new, top[:, None], logprobs.top),
    )


def any_unfinished(state: DecodeState) -> Any:
    """Returns True if any row is unfinished."""
    return ops.logical_not(ops.all(state.done))
