"""What compiles again and what does not."""

from functools import partial

import pytest

from keras_gemma import samplers
from keras_gemma.generation import programs
from keras_gemma.generation import session as run
from tests.models import compile_lm, make_lm, on_torch

PROMPT = [2, 9, 31, 8, 300]


@pytest.fixture(scope="module")
def quick():
    """Overridden: programs are compiled as they are for users."""


@pytest.fixture
def traces(monkeypatch):
    """The programs traced so far; a compiled program runs without its Python function."""
    if on_torch():
        pytest.skip("PyTorch compiles blocks, not programs")
    counts = []
    for module, name in ((programs, "read_chunk"), (run, "advance"), (run, "step")):
        function = getattr(module, name)

        def traced(*args, function=function, name=name, **kwargs):
            counts.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, traced)
    return counts


def test_settings_and_lengths_compile_nothing(traces):
    lm = make_lm()
    compile_lm(lm, sampler=samplers.TopPSampler(p=0.5, k=9, seed=1))
    once = ["advance", "read_chunk", "step"]

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
    generate([[2] * 200], max_length=None, max_new_tokens=2)  # another bucket for a prompt alone
    assert sorted(traces) == ["advance", "read_chunk", "read_chunk", "step"]
    generate(max_length=258)  # a longer cache
    assert sorted(traces) == ["advance", "read_chunk", "read_chunk", "step", "step"]
    generate(max_length=258)
    compile_lm(lm, sampler="greedy")
    generate()
    assert len(traces) == 7
    generate(temperature=0.5)
    assert len(traces) == 9


@pytest.fixture
def dynamo(monkeypatch):
    """PyTorch's compiler, used for models of any size; it counts its work."""
    if not on_torch():
        pytest.skip("a trait of PyTorch's compiler")
    import torch

    monkeypatch.setattr("keras_gemma.backend.torch.MIN_COMPILED_BYTES", 0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()


# PyTorch's own, on its first compilation.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_torch_compiles_a_block_and_the_head_once_a_shape(dynamo):
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
def test_torch_takes_any_number_of_shapes(dynamo, monkeypatch):
    import torch

    # Capturing a graph counts as compiling it; Inductor's part is left out.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    lm = make_lm(run_eagerly=False)
    row = lm.generate([PROMPT], max_new_tokens=6, stop_token_ids=None)
    for batch in range(2, 12):
        rows = lm.generate([PROMPT] * batch, max_new_tokens=6, stop_token_ids=None)
        assert rows == row * batch
    assert dynamo["unique_graphs"] == 22
