"""Keys and values of the text so far, one pair of arrays `[B, R, K, H]` a layer.

A layer that sees everything keeps R = S slots, as many as the text may grow to. A local layer keeps
R = its window, as a ring: position p lies in slot p mod R, where it has just replaced position
p - R, the first that p no longer sees.

    R = 4, the text is at position 6      slot      0  1  2  3
                                          position  4  5  6  3

With R = S the ring never turns, so both kinds of layer share every function here. Each row has
its own length: rows are neither padded nor read again.
"""

from typing import Any

import numpy as np
from keras import ops

from keras_gemma.config import GemmaConfig

Cache = list[tuple[Any, Any]]
"""Keys and values of every layer."""


def slot_of(positions: Any, slots: int) -> Any:
    """The slot of each of `positions` in a ring of `slots`."""
    return ops.mod(positions, slots)


def position_in(slots: int, last: Any) -> Any:
    """The position that each slot holds when each row has come to position `last [B]`.

    Returns:
        int32 `[B, R]`; negative where the slot is still empty.
    """
    slot = ops.arange(slots, dtype="int32")[None]
    last = last[:, None]
    return last - ops.mod(last - slot, slots)


def cache_mask(slots: int, positions: Any, window: int | None) -> Any:
    """Which slots the queries at `positions [B, T]` see, once the last of them is written.

    Args:
        slots: R, at least the window and what is read beyond its first token: `window + T - 1`.
        positions: int32, one after the other.
        window: positions in sight, its own included; None for all.

    Returns:
        bool `[B, T, R]`.
    """
    held = position_in(slots, positions[:, -1])[:, None, :]
    positions = positions[:, :, None]
    visible = ops.logical_and(held >= 0, held <= positions)
    if window is not None:
        visible = ops.logical_and(visible, held > positions - window)
    return visible


def make_cache(config: GemmaConfig, batch: int, slots: int, dtype: str) -> Cache:
    """A cache without content, of `slots` in every layer, rings or not."""
    shape = (batch, slots, config.num_key_value_heads, config.head_dim)
    return [
        (ops.zeros(shape, dtype=dtype), ops.zeros(shape, dtype=dtype))
        for _ in range(config.num_layers)
    ]


def resize(array: Any, slots: int) -> Any:
    """A copy of `array [B, R, ...]`, which has not turned, with `slots` in the place of R."""
    held = array.shape[1]
    if slots <= held:
        return ops.copy(array[:, :slots])
    rest = [(0, 0)] * (len(array.shape) - 2)
    return ops.pad(array, [(0, 0), (0, slots - held), *rest])


def grow_cache(cache: Cache, slots: list[int]) -> Cache:
    """The cache with at least `slots` in each layer; what is large enough is not copied."""
    return [
        tuple(resize(array, size) if array.shape[1] < size else array for array in kept)
        for kept, size in zip(cache, slots, strict=True)
    ]


def repeat_rows(array: Any, times: int) -> Any:
    """A copy of `array [B, ...]` with each row `times` times: `[B * times, ...]`.

    `ops.repeat` may give a view, in which the copies of a row are one memory.
    """
    rows = np.repeat(np.arange(array.shape[0]), times)
    return ops.take(array, ops.convert_to_tensor(rows.astype("int32")), axis=0)


def fill_ring(fresh: Any, slots: int, lengths: Any) -> Any:
    """A ring after a prompt: keys or values `fresh [B, T, K, H]` -> `[B, R, K, H]`.

    Args:
        fresh: of the whole prompt, by position.
        slots: R.
        lengths: `[B]`, the true length of each row.
    """
    last = ops.shape(fresh)[1] - 1
    source = ops.clip(position_in(slots, lengths - 1), 0, last)  # empty slots hold anything
    return ops.take_along_axis(fresh, source[:, :, None, None], axis=1)


def unroll_ring(ring: Any, slots: int) -> Any:
    """A ring `[B, R, K, H]` by position again: `[B, slots, K, H]`.

    Right where the ring still holds a position; what it has given up is something else now.
    """
    held = ring.shape[1]
    if held >= slots:
        return ring
    source = ops.convert_to_tensor((np.arange(slots) % held).astype("int32"))
    return ops.take(ring, source, axis=1)


def slots_of_layers(config: GemmaConfig, length: int, slack: int = 0) -> list[int]:
    """R of every layer, for texts of up to `length` tokens.

    Args:
        slack: tokens that may be written beyond the end of the text and taken back. A ring has as
            many slots more, so that they replace nothing that is still in sight.
    """
    slots = [config.cache_slots(layer, length) for layer in range(config.num_layers)]
    return [min(length, count + slack) for count in slots]
