"""The measurements of a machine: what is multiplied is right; speeds are only asked to be there."""

import numpy as np
import pytest
from keras import ops

from keras_gemma.benchmark import kernels, machine
from keras_gemma.config import GemmaConfig
from tests.configurations import GEMMA2

CONFIG = GemmaConfig(**GEMMA2)


def test_throughput_from_seconds(monkeypatch):
    """Two operations an element and product; the best size counts, up to the one that is slow."""
    sizes = []

    def seconds(program, x, other):
        sizes.append(x.shape[0])
        assert program(x, other).shape == (x.shape[0],)
        return {2: 1e-3, 4: 2e-3, 8: 1.0}[x.shape[0]]

    monkeypatch.setattr(machine, "SIZES", (2, 4, 8, 16))
    monkeypatch.setattr(machine, "_best_seconds", seconds)
    assert machine.matrix_throughput("bfloat16") == pytest.approx(2 * 4**3 / 2e-3)
    assert sizes == [2, 2, 2, 4, 4, 4, 8, 8, 8]


def test_throughput(monkeypatch):
    monkeypatch.setattr(machine, "SIZES", (8,))
    throughput, dtype = machine.best_product("bfloat16")
    assert throughput > 0 and dtype in ("bfloat16", "float32")


def test_matrices_are_all_of_the_model():
    shapes = {matrix.shape for matrix in kernels.matrices(CONFIG)}
    assert shapes == {shape for shape in CONFIG.weight_shapes().values() if len(shape) == 2}


@pytest.mark.parametrize("name", kernels.FORMS)
def test_forms_agree(name):
    form = kernels.FORMS[name]
    weight = kernels.random_array((6, 8), "float32", seed=1)
    x = kernels.random_array((3, 8), "float32", seed=2)
    packed = ops.convert_to_tensor(form.pack(weight.copy(), "matrix", "float32"))
    product = ops.convert_to_numpy(form.matmul(ops.convert_to_tensor(x), packed))
    np.testing.assert_allclose(product, x @ weight.T, atol=1e-6)


def test_kernels(monkeypatch):
    monkeypatch.setattr(kernels, "IN_A_ROW", (1, 1))
    monkeypatch.setattr(kernels, "LONG_ENOUGH", 1e-6)
    entries = list(kernels.measure_kernels(CONFIG, "bfloat16", rows=(1, 2)))
    assert len(entries) == kernels.count_kernels(CONFIG, rows=(1, 2)) == 6 * 3 * 2
    assert len({(e["matrix"], e["form"], e["rows"]) for e in entries}) == len(entries)
    assert all(entry["gb_per_second"] > 0 for entry in entries)
    assert entries[-1]["matrix"] == "head" and entries[-1]["shape"] == [512, 32]
