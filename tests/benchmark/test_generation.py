"""Calls of a measurement, and the results computed from their durations."""

import types

import pytest

from keras_gemma.benchmark import generation, memory
from keras_gemma.benchmark.generation import Seconds, Work, check_context, measure, time_calls
from keras_gemma.benchmark.random_model import random_model
from keras_gemma.config import GemmaConfig
from tests.configurations import GEMMA2


class Clocked:
    """Model that takes 1 s per prompt, 0.25 s per further token, and 5 s more in the first call."""

    def __init__(self):
        self.config = GemmaConfig(**GEMMA2)
        self.backbone = types.SimpleNamespace(config=self.config)
        self.now, self.calls = 0.0, []

    def compile(self, sampler):
        assert sampler == "greedy"

    def generate(self, ids, max_new_tokens, stop_token_ids):
        assert stop_token_ids is None
        assert all(0 <= i < self.config.vocabulary_size for row in ids for i in row)
        self.now += 1 + 0.25 * (max_new_tokens - 1) + 5 * (not self.calls)
        self.calls.append((len(ids), {len(row) for row in ids}, max_new_tokens))


def test_seconds_of_calls(monkeypatch):
    lm = Clocked()
    monkeypatch.setattr(generation.time, "perf_counter", lambda: lm.now)
    seconds = time_calls(lm, Work(prompt=7, new=5, batch=2, repeat=2))
    assert seconds == Seconds(first_call=7.0, first_token=1.0, whole=2.0)
    assert seconds.steps_per_second(new=5) == 4.0
    assert lm.calls == [(2, {7}, new) for new in (5, 1, 1, 5, 1, 5)]


def test_too_short_to_measure():
    assert Seconds(1.0, 0.5, 0.5).steps_per_second(2) is None


def test_results_are_consistent(monkeypatch):
    monkeypatch.setattr(generation.backend, "memory_bandwidth", lambda: 10e9)
    monkeypatch.setattr(generation, "best_product", lambda dtype: (1e12, dtype))
    monkeypatch.setattr(generation, "time_calls", lambda lm, work: Seconds(9.0, 0.5, 1.5))
    config = GemmaConfig(**GEMMA2)
    work = Work(prompt=8, new=11, batch=2)
    figures = measure(lambda: random_model(config, "bfloat16"), work)
    assert figures["prefill_tokens_per_second"] == 2 * 8 / 0.5
    assert figures["decode_tokens_per_second"] == 2 * 10 / 1.0
    assert figures["tokens_per_second"] == pytest.approx(2 * 11 / 1.5, rel=1e-3)
    assert figures["weights_gb"] == pytest.approx(2 * config.parameter_count / 1e9, rel=1e-3)
    assert figures["mbu"] == pytest.approx(10 * figures["read_per_step_gb"] / 10, rel=1e-3)
    assert figures["first_call_seconds"] == 9.0


@pytest.mark.parametrize("name", ["prompt", "new", "batch", "repeat"])
def test_size_is_too_small(name):
    with pytest.raises(ValueError, match=rf"`{name}` must be an? .*integer.* Received: {name}=0"):
        Work(**{name: 0})


def test_context():
    config = GemmaConfig(**GEMMA2)
    check_context(config, Work(prompt=8000, new=192))
    with pytest.raises(ValueError, match=r"8192 tokens.*prompt=8000, new=193"):
        check_context(config, Work(prompt=8000, new=193))


def test_peak_memory():
    if memory.peak() is None:
        pytest.skip("known only on Linux")
    memory.reset_peak()
    before = memory.resident()
    block = bytearray(64 << 20)
    block[::4096] = bytes(len(block[::4096]))
    assert memory.peak() - before > 60 << 20


def test_memory_is_unknown_on_other_systems(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "STATUS", tmp_path / "status")
    memory.reset_peak()
    assert memory.resident() is None and memory.peak() is None
