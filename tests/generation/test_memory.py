"""What is estimated before the work is no less than what the work takes."""

import subprocess
import sys

import pytest

from keras_gemma.benchmark import memory
from keras_gemma.config import GemmaConfig
from keras_gemma.generation import memory as estimate
from keras_gemma.generation.memory import Load, bytes_needed
from tests.configurations import GEMMA2

SIZES = GEMMA2 | {"head_dim": 32, "sliding_window_size": 64, "context_length": 512}

MEASURE = """
import sys
import keras_gemma
from keras_gemma import samplers
from keras_gemma.benchmark import memory
from keras_gemma.generation import memory as estimate
from keras_gemma.generation.strategies import beam
from keras_gemma.generation import generate as generator

estimates = []
def note(request, config, dtype, **more):
    load = estimate.load_of(request, **more)
    estimates.append(estimate.bytes_needed(load, config, dtype))
beam.check_memory = generator.check_memory = note

SIZES = {sizes}
lm = keras_gemma.GemmaCausalLM(keras_gemma.GemmaBackbone(**SIZES, dtype="float32"))
def generate(rows):
    many = {{
        "copies": {{"num_return_sequences": rows, "temperature": 1.0}},
        "beams": {{"sampler": samplers.BeamSampler(num_beams=rows)}},
    }}[sys.argv[1]]
    lm.generate([[2] * 200], max_new_tokens=3, stop_token_ids=None, **many)
generate(2)
before = memory.resident()
memory.reset_peak()
generate(600)
print(memory.peak() - before, estimates[-1])
"""


@pytest.mark.parametrize("work", ["copies", "beams"])
def test_no_more_is_taken_than_estimated(work, command_environment):
    if memory.peak() is None:
        pytest.skip("this system does not tell")
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


def test_the_most_that_a_part_holds(monkeypatch):
    """Keys and values by hand: 4 layers, 2 of them rings; float32, 2 heads of 32."""
    monkeypatch.setattr(estimate, "COPIES", dict.fromkeys(estimate.COPIES, 0))
    config = GemmaConfig(**SIZES)
    slot = 2 * 2 * 32 * 4
    load = Load(prompts=1, copies=1000, prompt=200, text=203)
    full, rings = 1000 * 4 * 256 * slot, 1000 * 2 * (256 + 64) * slot
    begin = full + 1000 * 2 * 64 * slot
    assert begin < bytes_needed(load, config, "float32") < 1.6 * begin
    moved = Load(prompts=1, copies=1000, prompt=200, text=203, moves=True)
    assert bytes_needed(moved, config, "float32") - bytes_needed(load, config, "float32") > rings
    assert bytes_needed(load, config, "bfloat16") < bytes_needed(load, config, "float32")
