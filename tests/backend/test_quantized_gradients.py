"""Gradients of products with int8 and int4 weights: values, and memory of saved tensors."""

import keras
import ml_dtypes
import numpy as np
import pytest
from keras import ops

from keras_gemma import backend
from keras_gemma.backend import Quantized
from tests.backend.arrays import assert_close, normal, tensor

NAME = keras.config.backend()

# One chunk, several chunks, and blocks of whole groups; groups of 32.
SHAPES = [(48, 96), (2064, 128), (16, 2560)]
FORMS = {"int8": (8, False), "int4": (4, False), "int4_zeros": (4, True)}

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # PyTorch's own


def plain_form(shape, bits, zero_points):
    """Returns a random weight in the plain form with different scales."""
    rng = np.random.default_rng(0)
    if bits == 8:
        values = rng.integers(-127, 128, shape, dtype="int8")
        return Quantized(values, rng.uniform(0.01, 0.02, shape[:1]).astype("float32"))
    groups, least = (shape[0], shape[1] // 32), 0 if zero_points else -8
    return Quantized(
        rng.integers(least, least + 16, shape, dtype="int8"),
        rng.uniform(0.1, 0.2, groups).astype(ml_dtypes.bfloat16),
        rng.integers(0, 16, groups).astype(ml_dtypes.bfloat16) if zero_points else None,
    )


def dequantized(plain):
    """Returns `[out, in]` in float64, from the definition."""
    values, scales, zero_points = (
        None if part is None else part.astype("float64") for part in plain
    )
    if scales.ndim == 1:
        return values * scales[:, None]
    zero_points = 0 if zero_points is None else np.repeat(zero_points, 32, axis=1)
    return np.repeat(scales, 32, axis=1) * (values - zero_points)


def stored(plain, bits):
    packed = backend.quantized_pack(plain, "matrix", bits)
    return Quantized(*(None if part is None else tensor(part, part.dtype.name) for part in packed))


def compiled(function):
    """Compiles a function with the framework's compiler."""
    if NAME == "jax":
        import jax

        return jax.jit(function)
    if NAME == "tensorflow":
        import tensorflow as tf

        return tf.function(function, jit_compile=True)
    import torch

    return torch.compile(function)


def gradient(function, x, compile_all=False):
    """Returns the gradient of the sum of `function(x)`."""
    if NAME == "jax":
        import jax

        by_x = jax.grad(lambda x: function(x).sum())
        return (compiled(by_x) if compile_all else by_x)(x)
    if NAME == "tensorflow":
        import tensorflow as tf

        def by_x(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = function(x)
            return tape.gradient(y, x)

        return (compiled(by_x) if compile_all else by_x)(x)
    x = x.requires_grad_()
    (compiled(function) if compile_all else function)(x).sum().backward()
    return x.grad


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [(1,), (2, 20)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_gradient_is_that_of_the_dequantized_weight(form, shape, rows, dtype):
    bits, zero_points = FORMS[form]
    plain = plain_form(shape, bits, zero_points)
    weight, cotangent = stored(plain, bits), normal(*rows, shape[0], dtype=dtype, seed=2)
    factor = tensor(cotangent, dtype)

    def function(x):
        return backend.matmul(x, weight) * factor

    actual = gradient(function, tensor(normal(*rows, shape[1], dtype=dtype), dtype))
    assert keras.backend.standardize_dtype(actual.dtype) == dtype
    assert_close(actual, cotangent @ dequantized(plain), dtype)


@pytest.mark.parametrize("form", FORMS)
def test_compiled_gradient(form):
    bits, zero_points = FORMS[form]
    plain = plain_form(SHAPES[0], bits, zero_points)
    weight, cotangent = stored(plain, bits), normal(3, SHAPES[0][0], seed=2)
    factor = tensor(cotangent)

    def function(x):
        return ops.tanh(backend.matmul(ops.sin(x), weight)) * factor

    x = normal(3, SHAPES[0][1])
    y = np.tanh(np.sin(x) @ dequantized(plain).T)
    expected = ((1 - y**2) * cotangent) @ dequantized(plain) * np.cos(x)
    assert_close(gradient(function, tensor(x), compile_all=True), expected, "float32")


@pytest.mark.skipif(NAME != "jax", reason="inspects JAX's residuals")
@pytest.mark.parametrize("form", FORMS)
def test_jax_saves_only_the_packed_weight(form):
    import jax

    weight = stored(plain_form(SHAPES[1], *FORMS[form]), FORMS[form][0])
    _, back = jax.vjp(lambda x: backend.matmul(x, weight), tensor(normal(40, SHAPES[1][1])))
    saved_bytes = sum(array.nbytes for array in jax.tree.leaves(back))
    assert saved_bytes <= sum(part.nbytes for part in weight if part is not None)


@pytest.mark.skipif(NAME != "torch", reason="inspects PyTorch's saved tensors")
@pytest.mark.parametrize("form", FORMS)
def test_torch_saves_only_the_packed_weight(form):
    import torch

    weight = stored(plain_form(SHAPES[1], *FORMS[form]), FORMS[form][0])
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        backend.matmul(tensor(normal(40, SHAPES[1][1])).requires_grad_(), weight)
    parts = {part.data_ptr() for part in weight if part is not None}
    assert {tensor.data_ptr() for tensor in saved} <= parts


@pytest.mark.skipif(NAME != "tensorflow", reason="inspects TensorFlow's graph")
@pytest.mark.parametrize("form", FORMS)
def test_tensorflow_saves_only_the_packed_weight(form):
    """The graph dequantizes the weight again for the gradient and passes on only the product."""
    import tensorflow as tf

    weight = stored(plain_form(SHAPES[1], *FORMS[form]), FORMS[form][0])
    x = tensor(normal(40, SHAPES[1][1]))
    forward = tf.function(lambda x: backend.matmul(x, weight))

    @tf.function
    def both(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = forward(x)
        return tape.gradient(y, x)

    calls = [op for op in both.get_concrete_function(x).graph.get_operations() if "Call" in op.type]
    floats = [out for op in calls for out in op.outputs if out.dtype.is_floating]
    assert len(calls) == 2
    assert max(np.prod(out.shape) for out in floats) < np.prod(SHAPES[1]) / 2
    assert both(x).shape == x.shape
