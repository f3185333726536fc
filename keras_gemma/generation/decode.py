"""Token after token: feed the last one, look at the cache, choose the next.

The loop owns stopping and output, the sampler owns the choice. Neither knows what a token means.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from keras import ops

from keras_gemma import backend
from keras_gemma.config import GemmaConfig
from keras_gemma.generation.samplers import Sampler
from keras_gemma.model.cache import cache_mask, slot_of
from keras_gemma.model.decoder_block import decoder_block
from keras_gemma.model.embedding import scale_embeddings
from keras_gemma.model.head import head
from keras_gemma.model.rope import rotary_angles


class Parts(NamedTuple):
    """The functions that a step calls, as they are or compiled apart (`backend.fuse`)."""

    block: Callable[..., Any] = decoder_block
    head: Callable[..., Any] = head


AS_THEY_ARE = Parts()


class DecodeState(NamedTuple):
    """All that changes from one token to the next."""

    token: Any  # int32 [B]: the last token of each row, not yet in the cache
    length: Any  # int32 [B]: tokens of each row, `token` included
    output: Any  # int32 [B, S]: what was chosen so far, zeros behind it
    count: Any  # int32 [B]: how many were
    room: Any  # int32 [B]: how many may be
    stop_ids: Any  # int32 [8]: ids that end a row, -1 where there are fewer
    done: Any  # bool [B]: rows that have ended
    cache: list[tuple[Any, Any]]  # keys and values [B, R, K, H] of each layer
    sampler: dict[str, Any]  # the sampler's settings and randomness


def feed(
    weights: dict[str, Any],
    state: DecodeState,
    config: GemmaConfig,
    parts: Parts = AS_THEY_ARE,
) -> tuple[Any, list[tuple[Any, Any]]]:
    """Read each row's last token.

    Returns:
        Logits of the next token, float32 `[B, V]`, and the cache with this one in it.
    """
    position = state.length - 1
    x = backend.embed(state.token[:, None], weights["head"]["token_embedding"])
    x = scale_embeddings(x, config.embedding_scale)
    rotary = rotary_angles(position[:, None], config.head_dim)
    masks = {}
    cache = []
    for layer, kept in enumerate(state.cache):
        slots = kept[0].shape[1]
        if slots not in masks:
            masks[slots] = cache_mask(slots, position), slot_of(position, slots)
        mask, slot = masks[slots]
        x, kept = parts.block(x, weights["layers"][layer], config, rotary, mask, kept, slot)
        cache.append(kept)
    return parts.head(x[:, 0], weights["head"], config), cache


def advance(state: DecodeState, logits: Any, sampler: Sampler) -> DecodeState:
    """Choose each row's next token from `logits [B, V]` and put it down."""
    ids, sampler_state = sampler(logits, state.sampler)
    ids = ops.where(state.done, 0, ids)
    column = ops.arange(state.output.shape[1], dtype="int32")[None]
    here = ops.logical_and(column == state.count[:, None], ops.logical_not(state.done)[:, None])
    stopped = ops.any(ids[:, None] == state.stop_ids[None], axis=1)
    one = ops.where(state.done, 0, 1)
    count = state.count + one
    return state._replace(
        token=ids,
        length=state.length + one,
        output=ops.where(here, ids[:, None], state.output),
        count=count,
        done=ops.logical_or(state.done, ops.logical_or(stopped, count >= state.room)),
        sampler=sampler_state,
    )


def proceed(state: DecodeState) -> Any:
    """Whether a row is still growing."""
    return ops.logical_not(ops.all(state.done))
