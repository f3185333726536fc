"""Masks and penalties of logits, against their definitions in NumPy."""

import numpy as np
import pytest
from keras import ops

from keras_gemma.backend.reference import LOWEST
from keras_gemma.generation.penalties import penalize
from keras_gemma.generation.token_mask import apply_token_mask


@pytest.mark.parametrize(("size", "words"), [(32, 1), (70, 3), (70, 4)])
def test_mask(size, words):
    random = np.random.default_rng(0)
    logits = random.normal(size=(3, size)).astype("float32")
    bits = random.integers(0, 2**32, (3, words), dtype="uint32").view("int32")
    masked = apply_token_mask(ops.convert_to_tensor(logits), ops.convert_to_tensor(bits))
    expected = [
        [logits[b, i] if bits[b, i // 32] >> (i % 32) & 1 else LOWEST for i in range(size)]
        for b in range(3)
    ]
    np.testing.assert_array_equal(ops.convert_to_numpy(masked), np.array(expected, "float32"))


def test_penalties():
    logits = np.array([[1.0, -1.0, 2.0, 0.5], [1.0, -1.0, 2.0, 0.5]], "float32")
    seen = np.array([[True, True, False, False], [False, True, True, True]])
    counts = np.array([[0, 2, 0, 0], [0, 0, 1, 3]], "int32")
    repetition, frequency, presence = (
        np.array(value, "float32") for value in ([2.0, 1.0], [0.5, -0.25], [3.0, 0.125])
    )
    arrays = map(ops.convert_to_tensor, (logits, seen, repetition, counts, frequency, presence))
    result = ops.convert_to_numpy(penalize(*arrays))
    expected = [[0.5, -2 - 2 * 0.5 - 3, 2.0, 0.5], [1, -1, 2 + 0.25 - 0.125, 0.5 + 0.75 - 0.125]]
    np.testing.assert_array_equal(result, np.array(expected, "float32"))
    np.testing.assert_array_equal(ops.convert_to_numpy(penalize(ops.array(logits))), logits)
