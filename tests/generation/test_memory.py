"""The memory estimate of a request is an upper bound of its memory."""

import dataclasses
import subprocess
import sys

import pytest

from keras_gemma.benchmark import memory
from keras_gemma.config import GemmaConfig
from keras_gemma.generation import memory as estimate
from keras_gemma.generation.memory import Workload, bytes_needed
from tests.configurations import GEMMA2

SIZES = GEMMA2 | {"head_dim": 32, "sliding_window_size": 64, "context_length": 512}

MEASURE = """
import sys
import keras_gemma
from keras_gemma import samplers
from keras_gemma.benchmark import memory
from keras_gemma.generation import memory as estimate
from keras_gemma.generation.strategies import beam
from keras_gemma.generation import generate as generation

estimates = []
def record(request, backbone):
    work = estimate.workload_of(request, backbone.config)
    estimates.append(estimate.bytes_needed(work, backbone.config, backbone.compute_dtype))
beam.check_memory = generation.check_memory = record

SIZES = {sizes}
lm = keras_gemma.GemmaCausalLM(keras_gemma.GemmaBackbone(**SIZES, dtype="float32"))
def generate(rows):
    settings = {{
        "sequences": {{"num_return_sequences": rows, "temperature": 1.0}},
        "beams": {{"sampler": samplers.BeamSampler(num_beams=rows)}},
    }}[sys.argv[1]]
    lm.generate([[2] * 200], max_new_tokens=3, stop_token_ids=None, **settings)
generate(2)
before = memory.resident()
memory.reset_peak()
generate(600)
print(memory.peak() - before, estimates[-1])
"""


@pytest.mark.parametrize("work", ["sequences", "beams"])
def test_estimate_bounds_the_measured_memory(work, command_environment):
    if memory.peak() is None:
        pytest.skip("this system does not report its peak memory")
    program = MEASURE.format(sizes=SIZES)
    result = subprocess.run(
        [sys.executable, "-c", program, work],
        env=command_environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    taken, estimated = map(int, result.stdout.split()[-2:])
    assert taken <= estimated <= 4 * taken


def test_estimate_of_one_phase(monkeypatch):
    """Expects the keys and values computed by hand.

    4 layers, 2 of them with ring buffers; float32, 2 heads of size 32.
    """
    monkeypatch.setattr(estimate, "CACHE_COPIES", dict.fromkeys(estimate.CACHE_COPIES, 0))
    config = GemmaConfig(**SIZES)
    slot = 2 * 2 * 32 * 4
    work = Workload(num_prompts=1, rows_per_prompt=1000, prompt_length=200, text_length=203)
    full, rings = 1000 * 4 * 256 * slot, 1000 * 2 * (256 + 64) * slot
    begin = full + 1000 * 2 * 64 * slot
    assert begin < bytes_needed(work, config, "float32") < 1.6 * begin
    beams = dataclasses.replace(work, strategy="beam")
    assert bytes_needed(beams, config, "float32") - bytes_needed(work, config, "float32") > rings
    assert bytes_needed(work, config, "bfloat16") < bytes_needed(work, config, "float32")
