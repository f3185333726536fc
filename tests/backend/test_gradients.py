"""Gradients of products, compared with float64."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_gemma import backend


@pytest.mark.parametrize("rows", [5, 80])
@pytest.mark.parametrize("length", [64, 4608])
@pytest.mark.skipif(keras.config.backend() != "jax", reason="others use the framework's gradient")
def test_gradient_of_a_bfloat16_product_on_jax(rows, length):
    import jax

    random = np.random.default_rng(0)
    x, change = (random.normal(size=(rows, n)).astype("bfloat16") for n in (length, 32))
    weight = random.normal(size=(32, length)).astype("bfloat16")
    packed = backend.pack(weight.copy(), "matrix", "bfloat16")
    _, back = jax.vjp(backend.matmul, ops.convert_to_tensor(x), ops.convert_to_tensor(packed))
    by_x, by_weight = (np.array(g) for g in back(ops.convert_to_tensor(change)))
    x, change, weight = (a.astype("float64") for a in (x, change, weight))
    pairs = (by_x, change @ weight), (backend.unpack(by_weight, weight.shape), change.T @ x)
    for actual, expected in pairs:
        np.testing.assert_allclose(
            actual.astype("float64"), expected, rtol=1e-2, atol=1e-2 * np.abs(expected).max()
        )


@pytest.mark.parametrize("bits", [None, 8])
def test_gradient_of_an_embedding_product(bits, monkeypatch):
    monkeypatch.setattr(backend, "DEQUANTIZED_ROWS", 100)
    random = np.random.default_rng(0)
    weight, y = (random.normal(size=shape).astype("float32") for shape in ((256, 64), (2, 3, 256)))
    if bits is None:
        packed = ops.convert_to_tensor(backend.pack(weight.copy(), "embedding", "float32"))
    else:
        from keras_gemma.quantization import dequantize_array, quantize_array

        plain, _ = quantize_array(weight, bits, 32, False)
        weight = dequantize_array(plain, np.dtype("float32"))
        arrays = backend.quantized_pack(plain, "embedding", bits)
        packed = backend.Quantized(
            *(None if a is None else ops.convert_to_tensor(a) for a in arrays)
        )
    actual = ops.convert_to_numpy(backend.matmul_transposed(ops.convert_to_tensor(y), packed))
    np.testing.assert_allclose(actual, y @ weight, rtol=1e-4, atol=1e-4)
