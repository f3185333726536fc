"""What compiles again and what does not."""

import pytest

from keras_gemma import samplers
from keras_gemma.generation import generator
from tests.generation.models import compile_lm, make_lm, on_torch

PROMPT = [2, 9, 31, 8, 300]


@pytest.fixture
def traces(monkeypatch):
    """The programs traced so far; a compiled program runs without its Python function."""
    if on_torch():
        pytest.skip("PyTorch compiles blocks, not programs")
    counts = []
    for name in ("prefill", "feed"):
        function = getattr(generator, name)

        def traced(*args, function=function, name=name, **kwargs):
            counts.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(generator, name, traced)
    return counts


def test_settings_and_lengths_compile_nothing(traces):
    lm = make_lm()
    compile_lm(lm, sampler=samplers.TopPSampler(p=0.5, seed=1))
    lm.generate([PROMPT], max_length=24, stop_token_ids=None)
    assert sorted(traces) == ["feed", "prefill"]
    lm.generate([PROMPT], max_length=24, stop_token_ids=[7, 8], seed=5)
    for length in range(1, 17):
        lm.generate([[2] * length], max_length=24, stop_token_ids=None)
    lm.generate([PROMPT], max_new_tokens=18, stop_token_ids=None)
    compile_lm(lm, sampler=samplers.TopPSampler(p=0.9, seed=2, temperature=0.7))
    lm.generate([PROMPT], max_length=24, stop_token_ids=None)
    lm.backbone.trainable = False
    lm.generate([PROMPT], max_length=24, stop_token_ids=None)
    assert sorted(traces) == ["feed", "prefill"]
    lm.generate([PROMPT], max_length=33, stop_token_ids=None)  # a longer cache
    assert sorted(traces) == ["feed", "feed", "prefill", "prefill"]
    compile_lm(lm, sampler="greedy")
    lm.generate([PROMPT], max_length=24, stop_token_ids=None)
    assert len(traces) == 6


@pytest.mark.skipif(not on_torch(), reason="a trait of PyTorch's compiler")
def test_torch_compiles_a_block_once_a_shape():
    import torch

    eager = make_lm().generate([PROMPT], max_new_tokens=6, stop_token_ids=None)
    lm = make_lm(run_eagerly=False)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters["stats"]
    counters.clear()
    assert lm.generate([PROMPT], max_new_tokens=6, stop_token_ids=None) == eager
    assert counters["unique_graphs"] == 1
    lm.generate([PROMPT[:2]], max_new_tokens=9, stop_token_ids=[7], seed=5)
    compile_lm(lm, sampler=samplers.TopPSampler(p=0.9, temperature=0.7), run_eagerly=False)
    lm.generate([PROMPT], max_new_tokens=6, stop_token_ids=None)
    assert counters["unique_graphs"] == 1


@pytest.mark.skipif(not on_torch(), reason="a trait of PyTorch's compiler")
def test_torch_takes_any_number_of_shapes(monkeypatch):
    import torch

    def fuse(function, compile=torch.compile):
        monkeypatch.setattr(torch, "compile", lambda f, **kw: compile(f, backend="eager", **kw))
        return generator.backend._module.fuse(function)

    monkeypatch.setattr(generator.backend, "fuse", fuse)
    torch._dynamo.reset()
    lm = make_lm(run_eagerly=False)
    row = lm.generate([PROMPT], max_new_tokens=6, stop_token_ids=None)
    for batch in range(2, 12):
        rows = lm.generate([PROMPT] * batch, max_new_tokens=6, stop_token_ids=None)
        assert rows == row * batch
