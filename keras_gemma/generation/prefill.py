"""Prefill: reads prompts in chunks into a KV cache.

Bounded chunks bound the memory of attention, whatever the length of the prompt. Sizes of chunks and
caches are powers of two, so that lengths in the same bucket share a compiled program. During
prefill, local layers keep the whole prompt; their ring buffers are filled at the end.
"""

from typing import Any

from keras import ops

from keras_gemma.buckets import MIN_BUCKET, bucket
from keras_gemma.config import GemmaConfig
from keras_gemma.model.cache import Cache, fill_ring, slots_of_layers
from keras_gemma.model.transformer import forward_with_cache

MIN_CACHE_SLOTS = 256
"""Minimum number of cache slots. They cost little memory, and short texts never grow their
cache."""

MAX_CHUNK_TOKENS = 256
"""Maximum number of tokens in a prompt chunk, over all rows.

The engine makes decode steps between two chunks. With chunks of 512 tokens, they would wait twice
as long, and prefill would be up to 10 % faster."""


def chunks(start: int, end: int, batch: int) -> list[tuple[int, int]]:
    """Splits the positions from `start` to `end` into chunks, as pairs of start and size.

    The sizes are buckets, so the last chunk may exceed `end`.
    """
    largest = max(MIN_BUCKET, bucket(MAX_CHUNK_TOKENS // batch + 1) // 2)
    pairs = []
    while start < end:
        pairs.append((start, min(largest, bucket(end - start))))
        start += pairs[-1][1]
    return pairs


def capacity_for(length: int) -> int:
    """Returns the capacity of a cache for `length` tokens."""
    return bucket(length, MIN_CACHE_SLOTS)


def read_chunk(
    weights: dict[str, Any],
    token_ids: Any,
    start: Any,
    lengths: Any,
    hidden: Any,
    cache: Cache,
    config: GemmaConfig,
) -> tuple[Any, Cache]:
    """Reads `token_ids [B, T]`, a chunk of prompts of `lengths [B]`, at the position `start`.

    `hidden` is the output of the last block: `[B, D]` for the last token of each prompt that has
    ended, or `[B, S, D]` for all tokens. Returns it and the cache, updated with this chunk.

    Prompts are padded at the end. Padding needs no mask: the causal mask hides it from all prompt
    tokens, and decoding overwrites it in the cache.
    """
    b, t = ops.shape(token_ids)
    positions = start + ops.zeros((b, 1), dtype="int32") + ops.arange(t, dtype="int32")[None]
    x, cache = forward_with_cache(weights, token_ids, positions, cache, config, start=start)
    if len(hidden.shape) == 3:
        return ops.slice_update(hidden, (0, start, 0), x), cache
    last = lengths - 1 - start
    x = ops.take_along_axis(x, ops.clip(last, 0, t - 1)[:, None, None], axis=1)[:, 0]
    ends_here = ops.logical_and(last >= 0, last < t)[:, None]
    return ops.where(ends_here, x, hidden), cache


def to_rings(
    cache: Cache, lengths: Any, config: GemmaConfig, capacity: int, slack: int = 0
) -> Cache:
    """Returns the ring buffers for texts of up to `capacity` tokens, filled from the cache of
    prompts of `lengths [B]`. `slack` is the same as in `slots_of_layers`."""
    return [
        tuple(
            array if array.shape[1] == slots else fill_ring(array, slots, lengths)
            for array in arrays
        )
        for slots, arrays in zip(slots_of_layers(config, capacity, slack), cache, strict=True)
    ]
