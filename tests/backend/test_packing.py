"""Layout of long matrices in blocks."""

import numpy as np
import pytest

from keras_gemma.backend import packing
from tests.backend.arrays import normal


@pytest.mark.parametrize(
    ("length", "blocks"),
    [(32, 1), (2304, 1), (2305, 1), (4096, 2), (4608, 2), (4610, 1), (9216, 4), (16384, 8)],
)
def test_blocks(length, blocks):
    shape = (3, length)
    assert packing.count_blocks(shape, "matrix") == blocks
    packed = shape if blocks == 1 else (blocks, 3, length // blocks)
    assert packing.packed_shape(shape, "matrix") == packed
    assert length // blocks <= packing.MAX_BLOCK_LENGTH or blocks == 1


@pytest.mark.parametrize("length", [2048, 3072, 3584, 4608, 9216, 14336, 16384, 24576, 36864])
def test_published_lengths_are_split(length):
    blocks = packing.count_blocks((8, length), "matrix")
    assert length % blocks == 0 and length // blocks <= packing.MAX_BLOCK_LENGTH


@pytest.mark.parametrize("kind", ["embedding", "norm"])
def test_only_matrices_are_split(kind):
    assert packing.packed_shape((3, 4608), kind) == (3, 4608)


@pytest.mark.parametrize("shape", [(3, 32), (8, 4608), (5, 9216)], ids=str)
def test_sum_of_block_products(shape):
    weight, x = normal(*shape), normal(2, shape[1], seed=1)
    packed = packing.pack(weight, "matrix")
    assert packed.shape == packing.packed_shape(shape, "matrix")
    np.testing.assert_array_equal(packing.unpack(packed, shape), weight)
    if packed.ndim == 3:
        assert packed.flags.c_contiguous
        parts = np.split(x, packed.shape[0], axis=1)
        product = sum(part @ block.T for part, block in zip(parts, packed, strict=True))
        np.testing.assert_allclose(product, x @ weight.T, atol=1e-3)
