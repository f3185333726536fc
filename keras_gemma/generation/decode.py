"""Token after token: feed the last one, look at the cache, choose the next.

The loop owns stopping and output, the sampler owns the choice. Neither knows what a token means.
"""

from typing import Any, NamedTuple

import keras
from keras import ops

from keras_gemma.config import GemmaConfig
from keras_gemma.generation.samplers import Sampler
from keras_gemma.generation.samplers.sampler import LogitsProcessor
from keras_gemma.model.cache import Cache, grow_cache, resize
from keras_gemma.model.transformer import EAGER, BlockFunctions, forward_with_cache


class LogProbabilities(NamedTuple):
    """What the model itself thought of the tokens, in nats, by their place in the text."""

    chosen: Any  # float32 [B, S]
    top_ids: Any  # int32 [B, S, n]: the n likeliest
    top: Any  # float32 [B, S, n]: theirs


class DecodeState(NamedTuple):
    """All that changes from one token to the next."""

    text: Any  # int32 [B, S]: prompt and what was chosen so far, -1 behind it
    length: Any  # int32 [B]: tokens of each row; the last is not yet in the cache
    end: Any  # int32 [B]: the length at which a row ends
    stop_ids: Any  # int32 [8]: ids that end a row, -1 where there are fewer
    done: Any  # bool [B]: rows that have ended
    cache: Cache  # keys and values [B, R, K, H] of each layer
    sampler: dict[str, Any]  # the sampler's settings and randomness
    seen: Any = None  # bool [B, V]: tokens that are in the text, where repetition is penalised
    penalty: Any = None  # float32 [B]
    log_probabilities: LogProbabilities | None = None

    def grow(self, capacity: int, slots: list[int]) -> "DecodeState":
        """With room for texts of `capacity` tokens, and caches of `slots` a layer."""
        records = self.log_probabilities
        if records is not None:
            records = LogProbabilities(*(resize(array, capacity) for array in records))
        missing = capacity - self.text.shape[1]
        return self._replace(
            text=ops.pad(self.text, [(0, 0), (0, missing)], constant_values=-1),
            cache=grow_cache(self.cache, slots),
            log_probabilities=records,
        )


def step(
    weights: dict[str, Any],
    state: DecodeState,
    config: GemmaConfig,
    sampler: Sampler,
    processors: tuple[LogitsProcessor, ...] = (),
    parts: BlockFunctions = EAGER,
) -> DecodeState:
    """One token more in each row that has not ended."""
    position = (state.length - 1)[:, None]
    token = ops.take_along_axis(state.text, position, axis=1)
    x, cache = forward_with_cache(weights, token, position, state.cache, config, parts)
    logits = parts.head(x[:, 0], weights["head"], config)
    return advance(state._replace(cache=cache), logits, sampler, processors)


def advance(
    state: DecodeState,
    logits: Any,
    sampler: Sampler,
    processors: tuple[LogitsProcessor, ...] = (),
) -> DecodeState:
    """Choose each row's next token from `logits [B, V]` and put it down."""
    wanted = process(logits, state, processors)
    ids, sampler_state = sampler(wanted, state.sampler)
    growing = ops.logical_not(state.done)
    here = ops.logical_and(place(state) == state.length[:, None], growing[:, None])
    length = state.length + ops.cast(growing, "int32")
    stopped = ops.any(ids[:, None] == state.stop_ids[None], axis=1)
    seen = state.seen
    if seen is not None:
        tokens = ops.arange(logits.shape[-1], dtype="int32")[None]
        seen = ops.logical_or(seen, tokens == ids[:, None])
    return state._replace(
        text=ops.where(here, ids[:, None], state.text),
        length=length,
        done=ops.logical_or(state.done, ops.logical_or(stopped, length >= state.end)),
        sampler=sampler_state,
        seen=seen,
        log_probabilities=record(state, logits, ids, here),
    )


def place(state: DecodeState) -> Any:
    """The positions of a text, int32 `[1, S]`."""
    return ops.arange(ops.shape(state.text)[1], dtype="int32")[None]


def process(logits: Any, state: DecodeState, processors: tuple[LogitsProcessor, ...]) -> Any:
    """The logits that are sampled: repetition penalised, then what the caller's functions say.

    The penalty is that of Keskar et al., 2019, arXiv:1909.05858: positive logits of tokens that
    are in the text are divided by it, negative ones multiplied.
    """
    if state.penalty is not None:
        penalty = state.penalty[:, None]
        less = ops.where(logits > 0, logits / penalty, logits * penalty)
        logits = ops.where(state.seen, less, logits)
    for processor in processors:
        shape, after = tuple(logits.shape), processor(state.text, logits)
        received = tuple(after.shape) if hasattr(after, "shape") else f"{after!r:.80}"
        if received != shape:
            name = getattr(processor, "__name__", type(processor).__name__)
            raise ValueError(
                f"`logits_processors`: {name} must return logits of the shape it was given, "
                f"{shape}. Received: {received}"
            )
        logits = ops.cast(after, "float32")
    return logits


def record(state: DecodeState, logits: Any, ids: Any, here: Any) -> LogProbabilities | None:
    """The log-probabilities with those of `ids [B]` at `here`, bool `[B, S]`."""
    kept = state.log_probabilities
    if kept is None:
        return None
    logits = logits - ops.logsumexp(logits, axis=-1, keepdims=True)
    chosen = ops.take_along_axis(logits, ids[:, None], axis=1)
    count = kept.top.shape[-1]
    if not count:
        return kept._replace(chosen=ops.where(here, chosen, kept.chosen))
    top, top_ids = ops.top_k(logits, count)
    here = here[:, :, None]
    return LogProbabilities(
        chosen=ops.where(here[:, :, 0], chosen, kept.chosen),
        top_ids=ops.where(here, ops.cast(top_ids, "int32")[:, None], kept.top_ids),
        top=ops.where(here, top[:, None], kept.top),
    )


def no_log_probabilities(batch: int, capacity: int, count: int) -> LogProbabilities:
    """Room for those of texts of up to `capacity` tokens, and of the `count` likeliest."""
    zeros = keras.ops.zeros
    return LogProbabilities(
        chosen=zeros((batch, capacity)),
        top_ids=zeros((batch, capacity, count), dtype="int32"),
        top=zeros((batch, capacity, count)),
    )


def proceed(state: DecodeState) -> Any:
    """Whether a row is still growing."""
    return ops.logical_not(ops.all(state.done))
