"""Gradients of products with int8 and int4 weights: values, and memory of saved tensors."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_gemma import backend
from keras_gemma.backend import Quantized
from tests.backend.arrays import assert_close, normal, tensor
from tests.backend.quantized_weights import FORMS, dequantized, random_plain

NAME = keras.config.backend()

# One chunk, several chunks, and blocks of whole groups; groups of 32.
SHAPES = [(48, 96), (2064, 128), (16, 2560)]
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # PyTorch's own


def stored(plain, form):
    packed = backend.quantized_pack(plain, "matrix", FORMS[form].bits)
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
    plain = random_plain(shape, FORMS[form])
    weight, cotangent = stored(plain, form), normal(*rows, shape[0], dtype=dtype, seed=2)
    factor = tensor(cotangent, dtype)

    def function(x):
        return backend.matmul(x, weight) * factor

    actual = gradient(function, tensor(normal(*rows, shape[1], dtype=dtype), dtype))
    assert keras.backend.standardize_dtype(actual.dtype) == dtype
    assert_close(actual, cotangent @ dequantized(plain), dtype)


@pytest.mark.parametrize("form", FORMS)
def test_compiled_gradient(form):
    plain = random_plain(SHAPES[0], FORMS[form])
    weight, cotangent = stored(plain, form), normal(3, SHAPES[0][0], seed=2)
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

    weight = stored(random_plain(SHAPES[1], FORMS[form]), form)
    _, back = jax.vjp(lambda x: backend.matmul(x, weight), tensor(normal(40, SHAPES[1][1])))
    saved_bytes = sum(array.nbytes for array in jax.tree.leaves(back))
    assert saved_bytes <= sum(part.nbytes for part in weight if part is not None)


@pytest.mark.skipif(NAME != "torch", reason="inspects PyTorch's saved tensors")
@pytest.mark.parametrize("form", FORMS)
def test_torch_saves_only_the_packed_weight(form):
    import torch

    weight = stored(random_plain(SHAPES[1], FORMS[form]), form)
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

    weight = stored(random_plain(SHAPES[1], FORMS[form]), form)
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
