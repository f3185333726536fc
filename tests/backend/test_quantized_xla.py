"""Int8 and int4 weights on XLA: layout and products, compared with NumPy in float64."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_gemma import backend
from keras_gemma.backend import Layout, Quantized, packing
from keras_gemma.backend.xla_cpu import xla_quantized
from tests.backend.arrays import normal, tensor, to_numpy
from tests.backend.quantized_weights import FORMS, dequantized, random_plain, with_size

pytestmark = pytest.mark.skipif(keras.config.backend() == "torch", reason="XLA's layout")

# One chunk, several chunks, four blocks, blocks of whole groups, and eight groups in 8 bits.
SHAPES = [(6, 64), (2050, 128), (5, 9216), (3, 2560), (4, 256)]


def stored(plain: Quantized, kind: str, form: str) -> Quantized:
    packed = backend.quantized_pack(plain, kind, FORMS[form].bits)
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
    layout = with_size(form, group_size)
    plain = random_plain(shape, layout)
    packed = backend.quantized_pack(plain, kind, layout.bits)
    spec = backend.quantized_spec(shape, kind, layout)
    for array, described in zip(packed, spec, strict=True):
        assert (array is None) == (described is None)
        if array is not None:
            assert (array.shape, array.dtype.name) == described
            assert array.flags.c_contiguous
    back = backend.quantized_unpack(packed, shape, layout)
    for array, expected in zip(back, plain, strict=True):
        np.testing.assert_array_equal(array, expected)
        assert array is None or array.dtype == expected.dtype


def test_odd_group_size_is_an_error():
    with pytest.raises(ValueError, match=r"`group_size` must be even.*Received: group_size=3"):
        xla_quantized.spec((2, 9), "matrix", Layout(4, 3))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMS)
def test_embed(form, dtype):
    plain = random_plain((10, 64), FORMS[form])
    for ids in (np.array([[3, 0, 9], [9, 1, 1]], "int32"), np.array(4, "int32")):
        actual = backend.embed(tensor(ids, "int32"), stored(plain, "embedding", form), dtype)
        assert keras.backend.standardize_dtype(actual.dtype) == dtype
        assert_near(actual, dequantized(plain)[ids], dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [(1,), (2,), (1, 1), (2, 20)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_matmul(form, rows, shape):
    plain, x = random_plain(shape, FORMS[form]), normal(*rows, shape[1])
    actual = backend.matmul(tensor(x), stored(plain, "matrix", form))
    assert_near(actual, x @ dequantized(plain).T, "float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 2, 5, 40, 70])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("where", ["compile", "jit_part", "loop"])
def test_matmul_compiled(where, form, rows, dtype):
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
            random_plain(shape, FORMS[form]),
            normal(rows, shape[1], dtype=dtype, seed=1),
        )
        actual = product(tensor(x, dtype), stored(plain, "matrix", form))
        assert keras.backend.standardize_dtype(actual.dtype) == dtype
        assert_near(actual, x @ dequantized(plain).T, dtype)


@pytest.mark.parametrize("form", FORMS)
def test_packed_arrays_are_aligned(form):
    layout = FORMS[form]
    packed = backend.quantized_pack(random_plain((3, 9216), layout), "matrix", layout.bits)
    assert packed.values.ctypes.data % packing.ALIGNMENT == 0


@pytest.mark.parametrize("form", FORMS)
def test_layout_on_an_accelerator(form, monkeypatch):
    from importlib import import_module

    module = import_module(f"keras_gemma.backend.{keras.config.backend()}")
    monkeypatch.setattr(module, "on_cpu", lambda: False)
    plain, x = random_plain((6, 64), FORMS[form]), normal(3, 64)
    weight = stored(plain, "embedding", form)
    assert weight.values.shape[0] == 6
    assert_near(backend.matmul(tensor(x), weight), x @ dequantized(plain).T, "float32")
    rows = backend.embed(tensor(np.array([4, 0]), "int32"), weight, "float32")
    assert_near(rows, dequantized(plain)[[4, 0]], "float32")


@pytest.mark.skipif(keras.config.backend() != "jax", reason="eager TensorFlow compiles nothing")
@pytest.mark.parametrize("form", FORMS)
def test_eager_products_compile_once(form, caplog):
    import jax

    weight, x = (
        stored(random_plain(SHAPES[2], FORMS[form]), "matrix", form),
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
