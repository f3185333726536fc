"""KV cache: keys and values of the text so far, one pair of arrays `[B, R, K, H]` per layer.

A global layer has R = S slots, where S is the maximum text length. A local layer has as many slots
as its window, used as a ring: position p is in slot p mod R, where it replaces position p - R, the
first one outside the window of p.

    R = 4, the text is at position 6      slot      0  1  2  3
                                          position  4  5  6  3

With R = S the ring never wraps, so both kinds of layers share all functions here. Each row has its
own length, so rows are not padded.
"""

from typing import Any

import numpy as np
from keras import ops

from keras_gemma import backend
from keras_gemma.config import GemmaConfig

Cache = list[tuple[Any, Any]]
"""Keys and values of every layer."""


def slot_of(positions: Any, slots: int) -> Any:
    """Returns the slot of each position in a ring of `slots`."""
    return positions % slots


def position_in(slots: int, last: Any) -> Any:
    """Returns the position in each slot after `last [B]`: int32 `[B, R]`, negative if empty."""
    slot, last = ops.arange(slots, dtype="int32")[None], last[:, None]
    return last - (last - slot) % slots


def cache_mask(slots: int, positions: Any, window: int | None) -> Any:
    """Returns the slots that are visible to queries whose keys are in the cache: bool `[B, T, R]`.

    `positions [B, T]` are consecutive in each row. R is at least `window + T - 1`, so that no
    query's window is overwritten.
    """
    stored = position_in(slots, positions[:, -1])[:, None, :]
    return visible_slots(stored, positions[:, :, None], window)


def visible_slots(stored: Any, positions: Any, window: int | None) -> Any:
    """Returns True for slots that are visible to a query: bool `[B, T, S]`.

    `stored` are the positions in the slots, `[B or 1, 1, S]`, negative if empty, and `positions`
    those of the queries, `[B, T, 1]`.
    """
    visible = ops.logical_and(stored >= 0, stored <= positions)
    if window is not None:
        visible = ops.logical_and(visible, stored > positions - window)
    return visible


def window_slots(slots: int, length: int, window: int | None) -> int | None:
    """Returns the number of slots that a chunk of a prompt can see in a cache by position.

    Args:
        slots: Slots of the cache, S.
        length: Tokens in the chunk.
        window: Sliding window of the layer. `None` for a global layer.

    Returns:
        The number of slots. `None` if the chunk can see all of them.
    """
    if window is None or window + length >= slots:
        return None
    return window + length


def take_slots(array: Any, first: Any, count: int) -> Any:
    """Returns `count` slots of `array [B, R, K, H]`, from the slot `first` on, an integer or an
    int32 scalar."""
    if isinstance(first, int):
        return array[:, first : first + count]
    zero = ops.zeros_like(first)
    b, _, k, h = array.shape
    return ops.slice(array, ops.stack([zero, first, zero, zero]), (b, count, k, h))


def make_cache(config: GemmaConfig, batch: int, slots: int | list[int], dtype: str) -> Cache:
    """Returns an empty cache. `slots` is the number of slots of every layer, or one per layer."""
    counts = [slots] * config.num_layers if isinstance(slots, int) else slots
    shapes = [(batch, n, config.num_key_value_heads, config.head_dim) for n in counts]
    return [(ops.zeros(shape, dtype=dtype), ops.zeros(shape, dtype=dtype)) for shape in shapes]


def resize(array: Any, slots: int) -> Any:
    """Returns a copy of `array [B, R, ...]`, whose ring has not wrapped, with R = `slots`."""
    size = array.shape[1]
    if slots <= size:
        return ops.copy(array[:, :slots])
    rest = [(0, 0)] * (len(array.shape) - 2)
    return ops.pad(array, [(0, 0), (0, slots - size), *rest])


def grow_cache(cache: Cache, slots: list[int]) -> Cache:
    """Returns the cache with at least `slots[i]` slots in layer i; copies only smaller layers."""
    return [
        tuple(resize(array, size) if array.shape[1] < size else array for array in pair)
        for pair, size in zip(cache, slots, strict=True)
    ]


def repeat_rows(array: Any, times: int) -> Any:
    """Repeats each row of `array [B, ...]` -> a new array `[B * times, ...]`."""
    # `ops.repeat` may return a view, in which the copies of a row share memory.
    rows = np.repeat(np.arange(array.shape[0]), times)
    return ops.take(array, backend.to_tensor(rows.astype("int32")), axis=0)


def fill_ring(fresh: Any, slots: int, lengths: Any) -> Any:
    """Returns the ring `[B, R, K, H]` after prompts of `lengths [B]` without padding.

    `fresh [B, T, K, H]` has the keys or values of the whole prompts by position.
    """
    last = ops.shape(fresh)[1] - 1
    source = ops.clip(position_in(slots, lengths - 1), 0, last)  # empty slots get any values
    return ops.take_along_axis(fresh, source[:, :, None, None], axis=1)


def unroll_ring(ring: Any, slots: int) -> Any:
    """Orders a ring `[B, R, K, H]` by position -> `[B, slots, K, H]`.

    Positions that the ring has overwritten get the values of later positions.
    """
    size = ring.shape[1]
    if size >= slots:
        return ring
    source = backend.to_tensor((np.arange(slots) % size).astype("int32"))
    return ops.take(ring, source, axis=1)


def slots_of_layers(config: GemmaConfig, length: int, slack: int = 0) -> list[int]:
    """Returns R of every layer for texts of up to `length` tokens.

    Rings get `slack` extra slots for draft tokens that are written after the end of the text and
    then rejected, so that these overwrite no visible position.
    """
    slots = [config.cache_slots(layer, length) for layer in range(config.num_layers)]
    return [min(length, count + slack) for count in slots]
