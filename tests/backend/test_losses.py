"""Cross entropy with its gradient, and `map`, compared with NumPy in float64."""

import numpy as np
import pytest
from keras import ops

from keras_gemma import backend
from tests.backend.arrays import assert_close, normal, tensor, to_numpy


@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cross_entropy(dtype, soft_cap, monkeypatch):
    monkeypatch.setattr(backend._module, "LOGITS_PER_CHUNK", 1500, raising=False)  # 2 rows
    products = 2 * normal(3, 5, 700, dtype=dtype)
    ids = np.random.default_rng(1).integers(0, 700, (3, 5)).astype("int32")
    ids[1] = products[1].argmax(-1)
    logits = products.astype("float64")
    if soft_cap is not None:
        logits = soft_cap * np.tanh(logits / soft_cap)
    target = np.eye(700)[ids]
    exp = np.exp(logits)
    expected = np.log(exp.sum(-1)) - (logits * target).sum(-1)
    gradient = exp / exp.sum(-1, keepdims=True) - target
    if soft_cap is not None:
        gradient = gradient * (1 - (logits / soft_cap) ** 2)
    losses, hits, change = backend.cross_entropy(
        tensor(products, dtype), tensor(ids, "int32"), soft_cap
    )
    assert_close(losses, expected, "float32")
    assert_close(change, gradient, dtype)
    assert to_numpy(hits)[1].tolist() == [1.0] * 5
    assert to_numpy(hits).sum() < 15


@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_log_sum_and_max(dtype, soft_cap, monkeypatch):
    monkeypatch.setattr(backend._module, "LOGITS_PER_CHUNK", 1500, raising=False)  # 2 rows
    products = 2 * normal(5, 700, dtype=dtype)
    logits = products.astype("float64")
    if soft_cap is not None:
        logits = soft_cap * np.tanh(logits / soft_cap)
    sums, largest = backend.log_sum_and_max(tensor(products, dtype), soft_cap)
    assert_close(sums, np.log(np.exp(logits).sum(-1)), "float32")
    assert_close(largest, logits.max(-1), "float32")


def test_map_takes_elements_in_order():
    x, y = normal(4, 2, 3), normal(4, 3)
    sums, products = backend.map(
        lambda parts: (ops.sum(parts[0]), ops.matmul(*parts)), (tensor(x), tensor(y))
    )
    assert_close(sums, x.sum((1, 2)), "float32")
    assert_close(products, np.einsum("nij,nj->ni", x, y), "float32")
