"""Attention and cache updates, compared with NumPy loops over heads."""

from functools import partial

import keras
import numpy as np
import pytest
from keras import ops

from keras_gemma import backend
from keras_gemma.backend import reference
from keras_gemma.scoring.gradient import gradient
from tests.backend.arrays import assert_close, normal, tensor, to_numpy


def attend_by_hand(query, key, value, mask, scale, soft_cap):
    """Computes one sequence, head and position at a time, in float64."""
    output = np.zeros(query.shape)
    heads_for_each_key = query.shape[2] // key.shape[2]
    for b, t, n in np.ndindex(query.shape[:3]):
        k = n // heads_for_each_key
        visible = np.flatnonzero(mask[b, t])
        if visible.size == 0:
            continue
        logits = key[b, visible, k].astype("float64") @ (query[b, t, n] * scale)
        if soft_cap is not None:
            logits = soft_cap * np.tanh(logits / soft_cap)
        weights = np.exp(logits - logits.max())
        output[b, t, n] = weights / weights.sum() @ value[b, visible, k]
    return output


@pytest.mark.parametrize("module", [backend, reference], ids=["backend", "reference"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("queries", [1, 5])
def test_attend(queries, kv_heads, soft_cap, dtype, module):
    query = 4 * normal(2, queries, 4, 8, dtype=dtype)
    key = normal(2, 5, kv_heads, 8, dtype=dtype, seed=1)
    value = normal(2, 5, kv_heads, 8, dtype=dtype, seed=2)
    mask = np.random.default_rng(3).random((2, queries, 5)) < 0.6
    mask[0, 0] = False  # a fully masked query
    mask[1, 0] = True
    actual = module.attend(
        *(tensor(x, dtype) for x in (query, key, value)),
        ops.convert_to_tensor(mask),
        scale=0.7,
        soft_cap=soft_cap,
    )
    assert keras.backend.standardize_dtype(actual.dtype) == dtype
    assert_close(actual, attend_by_hand(query, key, value, mask, 0.7, soft_cap), dtype)
    np.testing.assert_array_equal(to_numpy(actual)[0, 0], 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_gradient_of_attention(soft_cap, dtype):
    """The gradient of each backend's own forms is the reference's."""
    heads = [4 * normal(2, 5, 4, 8, dtype=dtype)]
    heads += [normal(2, 5, 2, 8, dtype=dtype, seed=seed) for seed in (1, 2)]
    mask = np.tril(np.ones((5, 5), "bool"))[None].repeat(2, axis=0)
    mask[0, 0] = False

    for i in range(3):

        def squares(x, module, i=i):
            inputs = [tensor(head, dtype) for head in heads]
            inputs[i] = ops.cast(x, dtype)
            output = module.attend(*inputs, tensor(mask, "bool"), scale=0.7, soft_cap=soft_cap)
            return ops.sum(ops.square(ops.cast(output, "float32")), axis=(1, 2, 3))

        actual, expected = (
            gradient(partial(squares, module=module), heads[i]) for module in (backend, reference)
        )
        assert np.abs(expected).max() > 0
        assert_close(actual, expected, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attend_to_a_cache_in_a_compiled_part(kv_heads, dtype):
    query = 4 * normal(3, 1, 4, 16, dtype=dtype)
    key = normal(3, 300, kv_heads, 16, dtype=dtype, seed=1)
    value = normal(3, 300, kv_heads, 16, dtype=dtype, seed=2)
    mask = np.arange(300)[None, None] < np.array([0, 7, 300])[:, None, None]

    def part(query, cache, mask):
        return backend.attend(query, cache["key"], cache["value"], mask, scale=0.3, soft_cap=3.0)

    cache = {"key": tensor(key, dtype), "value": tensor(value, dtype)}
    actual = backend.jit_part(part)(tensor(query, dtype), cache, ops.convert_to_tensor(mask))
    assert keras.backend.standardize_dtype(actual.dtype) == dtype
    assert_close(actual, attend_by_hand(query, key, value, mask, 0.3, 3.0), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "slots", [[[0]], [[5]], [[2], [2], [0]], [[3, 4, 5]], [[5, 0], [1, 2]]], ids=str
)
def test_write_cache(slots, dtype):
    slots = np.array(slots, "int32")
    cache = normal(len(slots), 6, 2, 3, dtype=dtype)
    new = normal(*slots.shape, 2, 3, dtype=dtype, seed=1)
    expected = cache.copy()
    for row, place in np.ndindex(slots.shape):
        expected[row, slots[row, place]] = new[row, place]
    slots = ops.convert_to_tensor(slots)
    in_a_part = backend.jit_part(lambda new, old, at: backend.write_cache(old["cache"], new, at))
    for write in (
        reference.write_cache,
        backend.write_cache,
        lambda cache, new, slots: in_a_part(new, {"cache": cache}, slots),
    ):  # the backend may overwrite the cache
        actual = write(tensor(cache.copy(), dtype), tensor(new, dtype), slots)
        np.testing.assert_array_equal(to_numpy(actual), expected)


@pytest.mark.skipif(keras.config.backend() != "torch", reason="only PyTorch writes in place")
def test_write_cache_in_place():
    cache = tensor(normal(2, 6, 2, 3))
    slots = ops.convert_to_tensor(np.array([[1], [2]], "int32"))
    actual = backend.write_cache(cache, tensor(normal(2, 1, 2, 3)), slots)
    assert actual.data_ptr() == cache.data_ptr()
