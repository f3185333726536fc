"""The prompt, read in chunks: its keys and values, and its last hidden state.

A chunk is bounded, so that the memory of reading is too, whatever the length of the prompt. While
a prompt is read, local layers keep all of it; rings are made at its end.
"""

from typing import Any

from keras import ops

from keras_gemma.config import GemmaConfig
from keras_gemma.model.cache import Cache, fill_ring, slots_of_layers
from keras_gemma.model.transformer import forward_with_cache


def read_chunk(
    weights: dict[str, Any],
    token_ids: Any,
    start: Any,
    lengths: Any,
    hidden: Any,
    cache: Cache,
    config: GemmaConfig,
) -> tuple[Any, Cache]:
    """Read the tokens from `start` on, of prompts that are padded at their ends.

    Padding stands behind every true position, where the causal mask hides it, and beyond the
    row's length, where decoding writes over it: it needs no mask of its own.

    Args:
        token_ids: int32 `[B, T]`.
        start: int32 scalar, the position of the first.
        lengths: int32 `[B]`, of the whole prompts.
        hidden: `[B, D]`, what has been said of the last token of rows that ended before; or
            `[B, S, D]`, of every token before.
        cache: of the chunks before, by position.

    Returns:
        `hidden` with the rows that end in this chunk, or with all its tokens, and the cache.
    """
    b, t = ops.shape(token_ids)
    positions = start + ops.zeros((b, 1), dtype="int32") + ops.arange(t, dtype="int32")[None]
    x, cache = forward_with_cache(weights, token_ids, positions, cache, config)
    if len(hidden.shape) == 3:
        return ops.slice_update(hidden, (0, start, 0), x), cache
    last = lengths - 1 - start
    x = ops.take_along_axis(x, ops.clip(last, 0, t - 1)[:, None, None], axis=1)[:, 0]
    here = ops.logical_and(last >= 0, last < t)[:, None]
    return ops.where(here, x, hidden), cache


def to_rings(
    cache: Cache, lengths: Any, config: GemmaConfig, capacity: int, slack: int = 0
) -> Cache:
    """The cache of a prompt as decoding keeps it, for texts of up to `capacity` tokens.

    Args:
        slack: as of `slots_of_layers`.
    """
    return [
        tuple(
            array if array.shape[1] == slots else fill_ring(array, slots, lengths) for array in kept
        )
        for slots, kept in zip(slots_of_layers(config, capacity, slack), cache, strict=True)
    ]
