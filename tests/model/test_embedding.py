"""Tied embedding: scale, lookup and logits."""

import math

import numpy as np
import pytest
from keras import ops

from keras_gemma.model.embedding import ReversibleEmbedding, scale_embeddings
from keras_gemma.model.head import soft_cap, to_logits


@pytest.mark.parametrize(
    ("hidden_dim", "scale"),
    [(2048, 45.25), (3072, 55.5), (2304, 48.0), (3584, 59.75), (4608, 68.0)],
)
def test_scale_is_rounded_to_bfloat16_first(hidden_dim, scale):
    ones = ops.ones((1, 1), dtype="bfloat16")
    scaled = scale_embeddings(ones, math.sqrt(hidden_dim))
    assert "bfloat16" in str(scaled.dtype)
    assert float(ops.convert_to_numpy(ops.cast(scaled, "float32"))[0, 0]) == scale


def test_scale_is_exact_in_float32():
    scaled = scale_embeddings(ops.ones((1, 1), dtype="float32"), math.sqrt(3072))
    assert ops.convert_to_numpy(scaled)[0, 0] == np.float32(math.sqrt(3072))


def test_soft_cap():
    x = np.array([-1000.0, -3.0, 0.0, 0.01, 30.0, 1000.0], "float32")
    actual = ops.convert_to_numpy(soft_cap(ops.convert_to_tensor(x), 30.0))
    np.testing.assert_allclose(actual, 30 * np.tanh(x.astype("float64") / 30), rtol=1e-5)
    assert np.abs(actual).max() <= 30
    assert soft_cap(x, None) is x


def test_logits_are_capped_float32():
    random = np.random.default_rng(0)
    hidden, embedding = random.normal(size=(1, 2, 8)), random.normal(size=(5, 8))
    actual = to_logits(ops.cast(hidden, "float32"), ops.cast(embedding, "float32"), 2.0)
    expected = 2 * np.tanh(hidden @ embedding.T / 2)
    np.testing.assert_allclose(ops.convert_to_numpy(actual), expected, rtol=1e-4)
    low = to_logits(ops.cast(hidden, "bfloat16"), ops.cast(embedding, "bfloat16"), 2.0)
    assert "float32" in str(low.dtype)


def test_layer_in_both_directions():
    layer = ReversibleEmbedding(5, 8, logit_soft_cap=2.0)
    layer.build()
    random = np.random.default_rng(0)
    table = random.normal(size=(5, 8)).astype("float32")
    layer.embeddings.assign(table)
    np.testing.assert_array_equal(ops.convert_to_numpy(layer(np.array([[4, 0]])))[0], table[[4, 0]])
    logits = ops.convert_to_numpy(layer(table[None], reverse=True))
    np.testing.assert_allclose(logits[0], 2 * np.tanh(table @ table.T / 2), rtol=1e-4, atol=1e-6)
    again = ReversibleEmbedding.from_config(layer.get_config())
    assert (again.input_dim, again.output_dim, again.logit_soft_cap) == (5, 8, 2.0)
