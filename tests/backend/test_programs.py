"""Compiled programs, loops and memory bandwidth."""

import math

import numpy as np
import pytest
from keras import ops

from keras_gemma import backend
from tests.backend.arrays import normal, tensor, to_numpy


def cond(state):
    return ops.logical_not(state["done"])


def step(weights, state):
    """Increments the count, multiplies `x`, and is done at 5."""
    count = state["count"] + 1
    return {"count": count, "x": state["x"] * weights["factor"], "done": count >= 5}


@pytest.mark.parametrize(("limit", "steps"), [(0, 0), (1, 1), (3, 3), (5, 5), (50, 5)])
def test_loop_stops(limit, steps):
    run = backend.while_loop(cond, step)
    state = {
        "count": ops.convert_to_tensor(0, dtype="int32"),
        "x": tensor(np.ones((2, 3), "float32")),
        "done": ops.convert_to_tensor(False),
    }
    state = run({"factor": tensor(np.float32(2.0))}, state, limit)
    assert int(to_numpy(state["count"])) == steps
    np.testing.assert_array_equal(to_numpy(state["x"]), 2.0**steps)
    assert bool(state["done"]) == (steps == 5)


def test_loop_of_a_finished_state():
    state = {
        "count": ops.convert_to_tensor(2, dtype="int32"),
        "x": tensor(np.ones(1, "float32")),
        "done": ops.convert_to_tensor(True),
    }
    state = backend.while_loop(cond, step)({"factor": tensor(np.float32(2.0))}, state, 9)
    assert int(to_numpy(state["count"])) == 2


def test_compile_keeps_results():
    def program(weights, cache):
        return {"cache": cache + weights["one"]}

    run = backend.compile(program)
    cache = tensor(np.zeros((4, 4), "float32"))
    for _ in range(3):
        cache = run({"one": tensor(np.ones((4, 4), "float32"))}, cache=cache)["cache"]
    np.testing.assert_array_equal(to_numpy(cache), 3)


def test_jit_part_keeps_results():
    def part(x, weights, offset):
        return backend.matmul(x, weights["w"]) + offset

    x, w = normal(2, 8), normal(3, 8, seed=1)
    actual = backend.jit_part(part)(tensor(x), {"w": tensor(w)}, tensor(np.float32(1.0)))
    np.testing.assert_allclose(to_numpy(actual), x @ w.T + 1, rtol=1e-5, atol=1e-5)


def test_memory_bandwidth():
    speed = backend.memory_bandwidth()
    assert math.isfinite(speed) and speed > 0
