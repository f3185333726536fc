"""Measurements of a machine: the products are correct, and the throughput is positive."""

import pytest

from keras_gemma.benchmark import machine


def test_throughput_from_seconds(monkeypatch):
    """Two operations per element and product. The fastest size counts, up to the first slow one."""
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
