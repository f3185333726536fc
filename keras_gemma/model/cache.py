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

from keras import ops

from keras_gemma.config import GemmaConfig


def slot_of(positions: Any, slots: int) -> Any:
    """The slot of each of `positions [B]` in a ring of `slots`."""
    return ops.mod(positions, slots)


def position_in(slots: int, last: Any) -> Any:
    """The position that each slot holds when each row has come to position `last [B]`.

    Returns:
        int32 `[B, R]`; negative where the slot is still empty.
    """
    slot = ops.arange(slots, dtype="int32")[None]
    last = last[:, None]
    return last - ops.mod(last - slot, slots)


def cache_mask(slots: int, last: Any) -> Any:
    """Which slots the query at position `last [B]` sees -> bool `[B, 1, R]`.

    A ring holds just the window, so being filled is being seen.
    """
    return (position_in(slots, last) >= 0)[:, None, :]


def fill_ring(fresh: Any, slots: int, lengths: Any) -> Any:
    """The cache after a prompt: keys or values `fresh [B, T, K, H]` -> `[B, R, K, H]`.

    Args:
        fresh: of the whole prompt, padded at its end.
        slots: R.
        lengths: `[B]`, the true length of each row.
    """
    last = ops.shape(fresh)[1] - 1
    source = ops.clip(position_in(slots, lengths - 1), 0, last)  # empty slots hold anything
    return ops.take_along_axis(fresh, source[:, :, None, None], axis=1)


def slots_of_layers(config: GemmaConfig, length: int) -> list[int]:
    """R of every layer, for texts of up to `length` tokens."""
    return [config.cache_slots(layer, length) for layer in range(config.num_layers)]
