"""Two texts as ids, the second padded, and comparisons."""

import numpy as np
from keras import ops

IDS = np.array([[2, 9, 31, 8, 300, 77, 5], [2, 400, 3, 17, 60, 0, 0]], "int32")
MASK = np.array([[1] * 7, [1] * 5 + [0] * 2], "int32")
TARGETS = np.roll(IDS, -1, axis=1)


def numpy(x):
    return ops.convert_to_numpy(x)


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
