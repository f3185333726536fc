"""Compilation: only new shapes and new rules compile."""

import logging
from functools import partial

import keras
import pytest

from keras_gemma import samplers
from keras_gemma.generation import programs, session
from tests.models import compile_lm, make_lm, on_torch

PROMPT = [2, 9, 31, 8, 300]


@pytest.fixture(scope="module")
def quick():
    """Overridden: programs are compiled as they are for users."""


@pytest.fixture
def traces(monkeypatch):
    """Names of the functions traced so far. A compiled program does not run its function."""
    if on_torch():
        pytest.skip("PyTorch compiles blocks, not programs")
    counts = []
    for module, name in (
        (programs, "read_chunk"),
        (session, "to_rings"),
        (session, "next_logits"),
    ):
        function = getattr(module, name)

        def traced(*args, function=function, name=name, **kwargs):
            counts.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, traced)
    return counts


def test_settings_and_lengths_do_not_recompile(traces):
    lm = make_lm()
    compile_lm(lm, sampler=samplers.TopPSampler(p=0.5, k=9, seed=1))
    once = ["next_logits", "read_chunk", "to_rings"]

    def generate(prompts=(PROMPT,), **settings):
        lm.generate(list(prompts), **{"max_length": 24, "stop_token_ids": None, **settings})

    generate()
    assert sorted(traces) == once
    generate(stop_token_ids=[7, 8], seed=5, top_p=0.8, top_k=3, temperature=[2])
    for length in range(1, 17):
        generate([[2] * length])
    generate(max_length=None, max_new_tokens=200)
    compile_lm(lm, sampler=samplers.RandomSampler(top_p=0.9, top_k=5, seed=2, temperature=0.7))
    generate()
    lm.backbone.trainable = False
    generate(return_logprobs=None)
    generate([[2] * 200], max_length=None, max_new_tokens=2)  # a larger chunk, but the same cache
    assert sorted(traces) == ["next_logits", "read_chunk", "read_chunk", "to_rings"]
    generate(max_length=258)  # a longer cache
    assert sorted(traces) == ["next_logits"] * 2 + ["read_chunk"] * 2 + ["to_rings"]
    generate(max_length=258)
    compile_lm(lm, sampler="greedy")
    generate()
    assert len(traces) == 7
    generate(temperature=0.5)
    assert len(traces) == 9


@pytest.fixture
def dynamo(monkeypatch):
    """Statistics of PyTorch's compiler, enabled for models of any size."""
    if not on_torch():
        pytest.skip("concerns PyTorch's compiler")
    import torch

    monkeypatch.setattr("keras_gemma.backend.torch.MIN_COMPILED_BYTES", 0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()


# PyTorch warns about its own code on its first compilation.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_torch_compiles_block_and_head_once_per_shape(dynamo):
    eager = make_lm().generate([PROMPT], max_new_tokens=6, stop_token_ids=None)
    assert dynamo["unique_graphs"] == 0
    lm = make_lm(run_eagerly=False)
    assert lm.generate([PROMPT], max_new_tokens=6, stop_token_ids=None) == eager
    assert dynamo["unique_graphs"] == 2
    lm.generate([PROMPT[:2]], max_new_tokens=9, stop_token_ids=[7], seed=5)
    compile_lm(lm, sampler=samplers.TopPSampler(p=0.9, temperature=0.7), run_eagerly=False)
    lm.generate([PROMPT], max_new_tokens=6, stop_token_ids=None)
    assert dynamo["unique_graphs"] == 2


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_torch_compiles_any_number_of_shapes(dynamo, monkeypatch):
    import torch

    # Captures graphs without Inductor, because the test only counts them.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    lm = make_lm(run_eagerly=False, num_layers=1)
    row = lm.generate([PROMPT], max_new_tokens=6, stop_token_ids=None)
    for batch in range(2, 12):
        rows = lm.generate([PROMPT] * batch, max_new_tokens=6, stop_token_ids=None)
        assert rows == row * batch
    assert dynamo["unique_graphs"] == 22


@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="concerns TensorFlow's warning")
def test_tensorflow_does_not_warn_about_retracing(caplog, monkeypatch):
    """Prompts in many buckets, each of which is traced once."""
    monkeypatch.setattr(logging.getLogger("tensorflow"), "propagate", True)
    lm = make_lm()
    for length in (3, 20, 40, 70, 130, 300):
        lm.generate([[2], [7] * length], max_new_tokens=1, stop_token_ids=None)
    assert "retracing" not in caplog.text
