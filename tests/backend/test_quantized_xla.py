"""Int8 and int4 weights on XLA: layout and products, compared with NumPy in float64."""

import keras
import ml_dtypes
import numpy as np
import pytest
from keras import ops

from keras_gemma import backend
from keras_gemma.backend import Quantized, packing
from keras_gemma.backend.xla_cpu import xla_quantized
from tests.backend.arrays import normal, tensor, to_numpy

pytestmark = pytest.mark.skipif(keras.config.backend() == "torch", reason="XLA's layout")

# One chunk, several chunks, four blocks, and blocks of whole groups.
SHAPES = [(6, 64), (2050, 128), (5, 9216), (3, 2560)]
FORMS = {"int8": (8, False), "int4": (4, False), "int4_zeros": (4, True)}
GROUP_SIZE = 32


def random_plain(shape, bits, zero_points, group_size=GROUP_SIZE, seed=0) -> Quantized:
    """Returns a random weight in the plain form with different scales."""
    rng = np.random.default_rng(seed)
    if bits == 8:
        values = rng.integers(-127, 128, shape, dtype="int8")
        return Quantized(values, rng.uniform(0.01, 0.02, shape[:1]).astype("float32"))
    low, high = (0, 16) if zero_points else (-8, 8)
    groups = shape[0], shape[1] // group_size
    return Quantized(
        rng.integers(low, high, shape, dtype="int8"),
        rng.uniform(0.1, 0.2, groups).astype(ml_dtypes.bfloat16),
        rng.integers(0, 16, groups).astype(ml_dtypes.bfloat16) if zero_points else None,
    )


def dequantized(plain: Quantized) -> np.ndarray:
    values, scales, zero_points = (
        None if part is None else part.astype("float64") for part in plain
    )
    if scales.ndim == 1:
        return values * scales[:, None]
    size = values.shape[1] // scales.shape[1]
    zero_points = 0 if zero_points is None else np.repeat(zero_points, size, axis=1)
    return np.repeat(scales, size, axis=1) * (values - zero_points)


def stored(plain: Quantized, kind: str, bits: int) -> Quantized:
    packed = backend.quantized_pack(plain, kind, bits)
    return Quantized(*(None if part is None else ops.convert_to_tensor(part) for part in packed))


def assert_near(actual, expected, dtype):
    actual = to_numpy(actual)
    assert actual.shape == expected.shape
    tolerance = {"float32": 1e-5, "bfloat16": 2**-7}[dtype] * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def in_a_loop(product):
    """Returns `product` as a decode step runs it."""
    step = backend.while_loop(lambda y: True, lambda inputs, y: product(*inputs))

    def run(x, weight):
        out = weight.values.shape[-2]
        return step((x, weight), ops.zeros((x.shape[0], out), x.dtype), 1)

    return run


@pytest.mark.parametrize("group_size", [2, 32, 128])
@pytest.mark.parametrize("kind", ["matrix", "embedding"])
@pytest.mark.parametrize("shape", [(5, 256), (3, 9216), (2, 3328)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_layout(form, shape, kind, group_size):
    bits, zero_points = FORMS[form]
    plain = random_plain(shape, bits, zero_points, group_size)
    packed = backend.quantized_pack(plain, kind, bits)
    spec = backend.quantized_spec(shape, kind, bits, group_size, zero_points)
    for array, described in zip(packed, spec, strict=True):
        assert (array is None) == (described is None)
        if array is not None:
            assert (array.shape, array.dtype.name) == described
            assert array.flags.c_contiguous
    back = backend.quantized_unpack(packed, shape)
    for array, expected in zip(back, plain, strict=True):
        np.testing.assert_array_equal(array, expected)


def test_odd_group_size_is_an_error():
    with pytest.raises(ValueError, match=r"`group_size` must be even.*Received: group_size=3"):
        xla_quantized.spec((2, 9), "matrix", 4, 3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMS)
def test_embed(form, dtype):
    bits, zero_points = FORMS[form]
    plain = random_plain((10, 64), bits, zero_points)
    ids = np.array([[3, 0, 9], [9, 1, 1]], "int32")
    actual = backend.embed(tensor(ids, "int32"), stored(plain, "embedding", bits), dtype)
    assert keras.backend.standardize_dtype(actual.dtype) == dtype
    assert_near(actual, dequantized(plain)[ids], dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [(1,), (2,), (1, 1), (2, 20)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_matmul(form, rows, shape):
    bits, zero_points = FORMS[form]
    plain, x = random_plain(shape, bits, zero_points), normal(*rows, shape[1])
    actual = backend.matmul(tensor(x), stored(plain, "matrix", bits))
    assert_near(actual, x @ dequantized(plain).T, "float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 2, 5, 40, 70])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("where", ["compile", "jit_part", "loop"])
def test_matmul_compiled(where, form, rows, dtype):
    bits, zero_points = FORMS[form]
    shapes = {"wide": SHAPES[2], "high": SHAPES[1]}
    if where == "loop":  # prefill does not run in a loop
        if rows > 5:
            pytest.skip("a decode step has few rows")
        compile_product = in_a_loop
    else:
        compile_product = getattr(backend, where)
    product = compile_product(lambda x, weight: backend.matmul(x, weight))
    for shape in shapes.values():
        plain, x = (
            random_plain(shape, bits, zero_points),
            normal(rows, shape[1], dtype=dtype, seed=1),
        )
        actual = product(tensor(x, dtype), stored(plain, "matrix", bits))
        assert keras.backend.standardize_dtype(actual.dtype) == dtype
        assert_near(actual, x @ dequantized(plain).T, dtype)


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_arrays_are_aligned(bits):
    packed = backend.quantized_pack(random_plain((3, 9216), bits, False), "matrix", bits)
    assert packed.values.ctypes.data % packing.ALIGNMENT == 0


@pytest.mark.parametrize("form", FORMS)
def test_layout_on_an_accelerator(form, monkeypatch):
    from importlib import import_module

    module = import_module(f"keras_gemma.backend.{keras.config.backend()}")
    monkeypatch.setattr(module, "on_cpu", lambda: False)
    bits, zero_points = FORMS[form]
    plain, x = random_plain((6, 64), bits, zero_points), normal(3, 64)
    weight = stored(plain, "embedding", bits)
    assert weight.values.shape[0] == 6
    assert_near(backend.matmul(tensor(x), weight), x @ dequantized(plain).T, "float32")
    rows = backend.embed(tensor(np.array([4, 0]), "int32"), weight, "float32")
    assert_near(rows, dequantized(plain)[[4, 0]], "float32")


@pytest.mark.skipif(keras.config.backend() != "jax", reason="eager TensorFlow compiles nothing")
@pytest.mark.parametrize("form", FORMS)
def test_eager_products_compile_once(form, caplog):
    import jax

    bits, zero_points = FORMS[form]
    weight, x = (
        stored(random_plain(SHAPES[2], bits, zero_points), "matrix", bits),
        normal(9, SHAPES[2][1]),
    )

    def run():
        y, back = jax.vjp(lambda x: backend.matmul(x, weight), tensor(x))
        return backend.matmul(tensor(x), weight), back(y)

    run()
    caplog.clear()
    with jax.log_compiles():
        run()
    assert "Compiling" not in caplog.text
