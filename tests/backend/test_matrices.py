"""Packed weights of the backend, compared with `reference.py`."""

import contextlib

import keras
import ml_dtypes
import numpy as np
import pytest
from keras import ops

from keras_gemma import backend
from keras_gemma.backend import reference
from tests.backend.arrays import assert_close, normal, tensor, to_numpy

# One block, two blocks, four blocks, and two lengths that cannot be split into multiples of 64.
SHAPES = [(6, 32), (8, 4608), (5, 9216), (3, 4610), (2, 2305)]


def pack(weight, kind, dtype="float32"):
    """Returns a packed tensor, as a variable of `dtype` stores it."""
    return tensor(backend.pack(weight, kind), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [(1,), (2,), (8,), (9,), (33,), (1, 1), (2, 4), (3, 11)], ids=str)
def test_matmul(rows, shape, dtype):
    weight = normal(*shape, dtype=dtype)
    x = normal(*rows, shape[1], dtype=dtype, seed=1)
    expected = to_numpy(reference.matmul(tensor(x), tensor(weight)))
    actual = backend.matmul(tensor(x, dtype), pack(weight, "matrix", dtype))
    assert keras.backend.standardize_dtype(actual.dtype) == dtype
    assert_close(actual, expected, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 9, 70])  # all code paths of the backends
@pytest.mark.parametrize("compile_part", [backend.compile, backend.jit_part], ids=["all", "part"])
def test_matmul_compiled(compile_part, rows, shape, dtype):
    weight, x = normal(*shape, dtype=dtype), normal(rows, shape[1], dtype=dtype, seed=1)
    compiled = compile_part(lambda x, weights: backend.matmul(x, weights["matrix"]))
    actual = compiled(tensor(x, dtype), {"matrix": pack(weight, "matrix", dtype)})
    assert keras.backend.standardize_dtype(actual.dtype) == dtype
    assert_close(actual, x @ weight.T, dtype)


@pytest.mark.skipif(keras.config.backend() == "torch", reason="XLA chooses kernels by size")
@pytest.mark.parametrize("rows", [2, 4])
def test_matmul_of_a_published_size(rows):
    weight = np.resize(normal(1_000_003, dtype="bfloat16"), (2304, 9216))
    x = normal(rows, 9216, dtype="bfloat16", seed=1)
    compiled = backend.jit_part(lambda x, weights: backend.matmul(x, weights["matrix"]))
    actual = compiled(tensor(x, "bfloat16"), {"matrix": pack(weight, "matrix", "bfloat16")})
    assert_close(actual, x @ weight.T, "bfloat16")


@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="a graph's unknown sizes")
def test_matmul_of_unknown_rows():
    import tensorflow as tf

    weight, x = normal(5, 4608), normal(3, 4608, seed=1)
    packed_shape = backend.packed_shape(weight.shape, "matrix")
    signature = [tf.TensorSpec((None, 4608)), tf.TensorSpec(packed_shape)]
    compiled = tf.function(backend.matmul, input_signature=signature)
    assert_close(compiled(tensor(x), pack(weight, "matrix")), x @ weight.T, "float32")


@pytest.mark.parametrize("kind", ["matrix", "embedding", "norm"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unpack_inverts_pack(shape, kind):
    weight = normal(*(shape if kind != "norm" else shape[1:]))
    packed = backend.pack(weight, kind)
    assert tuple(packed.shape) == tuple(backend.packed_shape(weight.shape, kind))
    np.testing.assert_array_equal(backend.unpack(packed, weight.shape), weight)


def test_pack_bfloat16():
    weight = normal(8, 4608, dtype="bfloat16")
    packed = backend.pack(weight.astype(ml_dtypes.bfloat16), "matrix")
    stored = ops.convert_to_tensor(packed, dtype="bfloat16")
    assert tuple(stored.shape) == tuple(backend.packed_shape(weight.shape, "matrix"))
    np.testing.assert_array_equal(backend.unpack(to_numpy(stored), weight.shape), weight)


@pytest.mark.parametrize("source", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize(("shape", "kind"), [((8, 4608), "matrix"), ((7,), "norm")], ids=str)
def test_assign(shape, kind, stored, source):
    weight = normal(*shape, dtype="bfloat16")
    packed = backend.pack(weight.astype(getattr(ml_dtypes, source, source)), kind, stored)
    for scope in (contextlib.nullcontext, backend.uninitialized):
        with scope():
            variable = keras.Variable(
                "zeros", shape=backend.packed_shape(shape, kind), dtype=stored, name="weight"
            )
        for array in (packed, packed + packed):  # initialization and reassignment
            backend.assign(variable, array)
            assert variable.dtype == stored
        actual = backend.unpack(to_numpy(variable.value), shape)
        np.testing.assert_array_equal(actual, 2 * weight)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(), (4,), (2, 3)], ids=str)
def test_embed(shape, dtype):
    table = normal(11, 2560, dtype=dtype)
    ids = np.random.default_rng(0).integers(0, 11, shape).astype("int32")
    actual = backend.embed(ops.convert_to_tensor(ids), pack(table, "embedding", dtype), dtype)
    np.testing.assert_array_equal(to_numpy(actual), to_numpy(reference.embed(ids, tensor(table))))
    np.testing.assert_array_equal(to_numpy(actual), table[ids])
