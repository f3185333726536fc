"""Parts compiled by PyTorch: results, cache lengths, threads and missing compilers."""

import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np
import pytest
from keras import ops

from keras_gemma import backend
from keras_gemma.backend import reference
from tests.backend.arrays import assert_close, normal, tensor, to_numpy

pytestmark = [
    pytest.mark.skipif(keras.config.backend() != "torch", reason="PyTorch's compiler"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),  # PyTorch's own
]

# One block, two blocks, four blocks, and a number of rows that is not a multiple of four.
SHAPES = [(16, 128), (8, 4608), (12, 9216), (6, 128)]


@pytest.fixture
def compiler(monkeypatch):
    """Compiles parts of any size with PyTorch's compiler; returns its counters."""
    import torch

    monkeypatch.setattr("keras_gemma.backend.torch.MIN_COMPILED_BYTES", 0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_matmul(dtype, compiler):
    def products(x, weights):
        return [backend.matmul(row, weights[shape]) for row, shape in x]

    weights = {shape: normal(*shape, dtype=dtype) for shape in SHAPES}
    rows = [
        (normal(*(1, count, shape[1])[-dims:], dtype=dtype, seed=1), shape)
        for shape in SHAPES
        for count, dims in ((1, 1), (1, 3), (2, 2), (3, 3), (4, 2))
    ]
    actual = backend.jit_part(products)(
        [(tensor(x, dtype), shape) for x, shape in rows],
        {shape: tensor(backend.pack(w, "matrix"), dtype) for shape, w in weights.items()},
    )
    assert compiler["unique_graphs"] == 1
    for y, (x, shape) in zip(actual, rows, strict=True):
        assert keras.backend.standardize_dtype(y.dtype) == dtype
        assert_close(y, x @ weights[shape].T, dtype)


@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_attend_for_any_length(soft_cap, compiler):
    def part(query, weights, mask, cache):
        return backend.attend(query, *cache, mask, scale=0.7, soft_cap=soft_cap)

    attend = backend.jit_part(part)
    for dtype in ("float32", "bfloat16"):
        for slots in (16, 40, 300):  # beyond 4096 Inductor compiles once more
            query = 4 * normal(2, 1, 4, 8, dtype=dtype)
            cache = [normal(2, slots, 2, 8, dtype=dtype, seed=seed) for seed in (1, 2)]
            mask = np.random.default_rng(3).random((2, 1, slots)) < 0.6
            mask[1] = False  # a fully masked query
            mask = ops.convert_to_tensor(mask)
            actual = attend(tensor(query, dtype), {}, mask, [tensor(x, dtype) for x in cache])
            expected = reference.attend(
                tensor(query), *map(tensor, cache), mask, scale=0.7, soft_cap=soft_cap
            )
            assert keras.backend.standardize_dtype(actual.dtype) == dtype
            assert_close(actual, to_numpy(expected), dtype)
    assert compiler["unique_graphs"] == 2  # one per dtype


def test_concurrent_threads(compiler):
    def part(x, weights):
        return ops.gelu(backend.matmul(x, weights["w"]))

    run = backend.jit_part(part)
    w = normal(12, 32)

    def work(rows):
        x = normal(rows, 32, seed=rows)
        actual = [to_numpy(run(tensor(x), {"w": tensor(w)})) for _ in range(20)]
        return x, actual

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(work, [1, 2, 5, 1, 2, 5]))
    assert compiler["unique_graphs"] == 3
    for x, actual in results:
        expected = to_numpy(ops.gelu(tensor(x @ w.T)))
        for y in actual:
            np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_errors_of_the_part_are_raised(compiler):
    def part(x, weights):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        backend.jit_part(part)(tensor(normal(1, 8)), {})


@pytest.mark.parametrize("compiler", ["/bin/false", "/nowhere/g++"])
def test_without_a_compiler_parts_run_uncompiled(compiler, command_environment, tmp_path):
    program = """
        import warnings
        import torch
        from keras_gemma.backend import torch as backend

        backend.MIN_COMPILED_BYTES = 0
        parts = [backend.jit_part(lambda x, weights, i=i: x @ weights["w"] + i) for i in range(2)]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for part in (*parts, *parts):
                print(part(torch.ones(1, 8), {"w": torch.ones(8, 1)}).item())
        print(sum("could not compile" in str(warning.message) for warning in caught), "warning")
    """
    environment = {**command_environment, "CXX": compiler, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split() == ["8.0", "9.0", "8.0", "9.0", "1", "warning"]
