"""KV cache, compared with a simulation in a Python list."""

import numpy as np
import pytest
from keras import ops

from keras_gemma import backend
from keras_gemma.config import GemmaConfig
from keras_gemma.model.cache import (
    cache_mask,
    fill_ring,
    position_in,
    resize,
    slot_of,
    slots_of_layers,
    unroll_ring,
)
from tests.configurations import GEMMA1, GEMMA2


def simulate(slots, length):
    """Returns the position in each slot after `length` positions were written; -1 if empty."""
    ring = [-1] * slots
    for position in range(length):
        ring[position % slots] = position
    return ring


@pytest.mark.parametrize("slots", [1, 2, 4, 7])
def test_positions_and_masks(slots):
    lengths = np.arange(1, 20, dtype="int32")
    last = ops.convert_to_tensor(lengths - 1)
    expected = np.array([simulate(slots, length) for length in lengths])
    actual = ops.convert_to_numpy(position_in(slots, last))
    np.testing.assert_array_equal(np.maximum(actual, -1), expected)
    for window in (None, slots):  # for one query, all filled slots are visible
        mask = ops.convert_to_numpy(cache_mask(slots, last[:, None], window))
        np.testing.assert_array_equal(mask, (expected >= 0)[:, None, :])
    slot = ops.convert_to_numpy(slot_of(last, slots))
    np.testing.assert_array_equal(expected[np.arange(len(slot)), slot], lengths - 1)


@pytest.mark.parametrize("length", [3, 4, 5, 11])
def test_unroll_ring(length):
    ring = np.array(simulate(4, length), "float32").reshape(1, 4, 1, 1)
    actual = unroll_ring(ops.convert_to_tensor(ring), 16)
    stored = np.arange(max(0, length - 4), length)
    assert actual.shape == (1, 16, 1, 1)
    np.testing.assert_array_equal(ops.convert_to_numpy(actual)[0, stored, 0, 0], stored)


@pytest.mark.parametrize("window", [None, 1, 3])
def test_mask_of_several_queries(window):
    """Three queries, in a ring with slots for the window and two more tokens."""
    count, slots = 3, 32 if window is None else window + 2
    for first in range(20):
        positions = np.arange(first, first + count, dtype="int32")[None]
        stored = np.array(simulate(slots, first + count))
        visible = (stored >= 0) & (stored <= positions[..., None])
        if window is not None:
            visible &= stored > positions[..., None] - window
            sizes = np.minimum(positions[0] + 1, window)
            np.testing.assert_array_equal(visible.sum(-1)[0], sizes)
        mask = cache_mask(slots, ops.convert_to_tensor(positions), window)
        np.testing.assert_array_equal(ops.convert_to_numpy(mask), visible)


@pytest.mark.parametrize("size", [2, 6, 9])
def test_resize(size):
    array = np.arange(12, dtype="float32").reshape(2, 6, 1, 1)
    actual = ops.convert_to_numpy(resize(ops.convert_to_tensor(array), size))
    assert actual.shape == (2, size, 1, 1)
    np.testing.assert_array_equal(actual[:, :6], array[:, :size])
    np.testing.assert_array_equal(actual[:, 6:], 0)


@pytest.mark.parametrize("slots", [3, 4, 6, 9])
def test_fill_ring(slots):
    """The ring equals that of writing the tokens one by one."""
    lengths = np.array([1, 2, 4, 6], "int32")
    fresh = np.random.default_rng(0).normal(size=(4, 6, 2, 3)).astype("float32")
    actual = fill_ring(ops.convert_to_tensor(fresh), slots, ops.convert_to_tensor(lengths))
    actual = ops.convert_to_numpy(actual)
    assert actual.shape == (4, slots, 2, 3)
    for row, length in enumerate(lengths):
        for slot, position in enumerate(simulate(slots, length)):
            if position >= 0:
                np.testing.assert_array_equal(actual[row, slot], fresh[row, position])


def test_writing_after_a_prompt():
    lengths = np.array([2, 5], "int32")
    values = np.arange(1, 25, dtype="float32").reshape(2, 12, 1, 1)
    prompt = ops.convert_to_tensor(values[:, :5])
    ring = fill_ring(prompt, 4, ops.convert_to_tensor(lengths))
    for step in range(6):
        position = ops.convert_to_tensor(lengths + step)
        new = np.stack([values[row, lengths[row] + step] for row in range(2)])[:, None]
        slots = slot_of(position, 4)[:, None]
        ring = backend.write_cache(ring, ops.convert_to_tensor(new), slots)
        actual = ops.convert_to_numpy(ring)[..., 0, 0]
        for row in range(2):
            for slot, stored in enumerate(simulate(4, lengths[row] + step + 1)):
                if stored >= 0:
                    assert actual[row, slot] == values[row, stored, 0, 0]


def test_slots_of_layers():
    assert slots_of_layers(GemmaConfig(**GEMMA2), 10) == [4, 10, 4, 10]
    assert slots_of_layers(GemmaConfig(**GEMMA2), 3) == [3, 3, 3, 3]
    assert slots_of_layers(GemmaConfig(**GEMMA1), 10) == [10, 10]
    assert slots_of_layers(GemmaConfig(**GEMMA2), 10, slack=3) == [7, 10, 7, 10]
    assert slots_of_layers(GemmaConfig(**GEMMA2), 5, slack=3) == [5, 5, 5, 5]
