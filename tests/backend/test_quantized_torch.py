"""Int8 and int4 weights on PyTorch: all code paths, compared with NumPy in float64."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_gemma import backend
from keras_gemma.backend import Layout, Quantized, quantized
from tests.backend.arrays import normal, tensor, to_numpy
from tests.backend.quantized_weights import FORMS, dequantized, random_plain, with_size

pytestmark = [
    pytest.mark.skipif(keras.config.backend() != "torch", reason="PyTorch's layout"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),  # PyTorch's own
]

# (out, in, group size): full lanes, fewer, one; groups of one word, of four and of sixteen.
SHAPES = [(48, 96, 32), (24, 64, 16), (3, 40, 8), (32, 256, 128)]


@pytest.fixture
def compiler(monkeypatch):
    """Compiles parts of any size with PyTorch's compiler."""
    import torch

    monkeypatch.setattr("keras_gemma.backend.torch.MIN_COMPILED_BYTES", 0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def plain_weight(out, length, group_size, form):
    """Returns a random weight in the plain form."""
    return random_plain((out, length), with_size(form, group_size), seed=out)


def stored(plain, form):
    """Returns a packed weight on the device."""
    packed = backend.quantized_pack(plain, "matrix", FORMS[form].bits)
    return Quantized(
        *(None if array is None else tensor(array, array.dtype.name) for array in packed)
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unpack_inverts_pack(shape, form):
    plain = plain_weight(*shape, form)
    layout = with_size(form, shape[2])
    packed = backend.quantized_pack(plain, "matrix", layout.bits)
    specified = backend.quantized_spec(shape[:2], "matrix", layout)
    unpacked = backend.quantized_unpack(packed, shape[:2], layout)
    for array, spec, before, after in zip(packed, specified, plain, unpacked, strict=True):
        if before is None:
            assert array is spec is after is None
        else:
            assert (array.shape, array.dtype.name) == spec
            assert array.flags.c_contiguous
            assert after.dtype == before.dtype
            np.testing.assert_array_equal(after, before)


def test_group_size_must_be_a_multiple_of_8():
    with pytest.raises(ValueError, match=r"`group_size` must be a multiple of 8.*group_size=20"):
        backend.quantized_spec((16, 40), "matrix", Layout(4, 20))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [(), (1,), (1, 5), (40,)], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matmul(shape, form, rows, dtype):
    plain = plain_weight(*shape, form)
    x = normal(*rows, shape[1], dtype=dtype, seed=1)
    check(backend.matmul(tensor(x, dtype), stored(plain, form)), x, plain, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_matmul_compiled(dtype, compiler):
    def products(x, weights):
        return [backend.matmul(x[rows, shape], w) for (rows, shape, _), w in weights.items()]

    plain = {
        (rows, shape, form): plain_weight(*shape, form)
        for rows in (1, 2, 5, 40)
        for shape in (SHAPES if rows == 1 else SHAPES[:1])
        for form in FORMS
    }
    weights = {key: stored(weight, key[2]) for key, weight in plain.items()}
    x = {key[:2]: normal(key[0], key[1][1], dtype=dtype, seed=1) for key in plain}
    inputs = {key: tensor(rows, dtype) for key, rows in x.items()}
    actual = backend.jit_part(products)(inputs, weights)
    for y, (key, weight) in zip(actual, plain.items(), strict=True):
        check(y, x[key[:2]], weight, dtype)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(2000, 512, 32)], ids=str)
def test_many_slices(shape, form, compiler):
    """The weight has more rows than one slice, and is large enough for compiled dequantization."""
    plain = plain_weight(*shape, form)
    x = normal(20, shape[1], dtype="bfloat16")
    check(backend.matmul(tensor(x, "bfloat16"), stored(plain, form)), x, plain, "bfloat16")


def test_without_a_compiler_there_is_one_warning(monkeypatch):
    from torch._dynamo.exc import Unsupported

    from keras_gemma.backend.torch import quantized as torch_quantized

    def broken():
        raise Unsupported("no compiler")

    monkeypatch.setattr(torch_quantized, "_compiled_dequantize_blocks", broken)
    monkeypatch.setattr(torch_quantized, "_can_compile", True)
    plain, x = plain_weight(2000, 2048, 32, "int4"), normal(20, 2048)
    with pytest.warns(UserWarning, match=r"int4 weights.*C\+\+ compiler: install one") as records:
        actual = [backend.matmul(tensor(x), stored(plain, "int4")) for _ in range(2)]
    assert len(records) == 1
    for y in actual:
        check(y, x, plain, "float32")


@pytest.mark.parametrize("form", FORMS)
def test_gradient(form):
    import torch

    plain = plain_weight(*SHAPES[0], form)
    x = tensor(normal(5, SHAPES[0][1])).requires_grad_()
    backend.matmul(x, stored(plain, form)).sum().backward()
    expected = np.broadcast_to(dequantized(plain).sum(0), x.shape)
    np.testing.assert_allclose(x.grad.cpu().numpy(), expected, rtol=1e-4, atol=1e-2)
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("ids", [5, [0, 17, 2], [[1, 1], [0, 2]]], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_embed(shape, form, ids):
    plain = plain_weight(*shape, form)
    ids = np.array(ids) % shape[0]
    actual = backend.embed(ops.convert_to_tensor(ids), stored(plain, form), "float32")
    np.testing.assert_allclose(to_numpy(actual), dequantized(plain)[ids], rtol=1e-6, atol=1e-6)


def check(actual, x, plain, dtype):
    """Checks equality up to the rounding of float32 sums, or of weights and results in bfloat16."""
    assert keras.backend.standardize_dtype(actual.dtype) == dtype
    expected = x.astype("float64") @ dequantized(plain).T
    actual = to_numpy(actual)
    assert actual.shape == expected.shape
    tolerance = {"float32": 1e-5, "bfloat16": 2**-7}[dtype] * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("form", FORMS)
def test_reference_dequantization(form):
    """Compares the layout of other backends with the definition."""
    plain = plain_weight(*SHAPES[0], form)
    packed = quantized.pack(plain, "matrix", FORMS[form].bits)
    arrays = packed.map(lambda array: tensor(array, array.dtype.name))
    actual = to_numpy(quantized.dequantize(arrays, "float32"))
    np.testing.assert_allclose(actual, dequantized(plain), rtol=1e-6, atol=1e-6)
