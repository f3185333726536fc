"""The comparison with other libraries, on a model of two layers: the same weights, the same ids."""

import json
import subprocess
import sys
from pathlib import Path

import keras
import pytest

ROOT = Path(__file__).parents[2]
COMPARE = ROOT / "examples" / "benchmarks" / "compare.py"


def run(environment, *arguments):
    command = [sys.executable, COMPARE, "--tiny", "--layers", "2", *arguments]
    environment = {**environment, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.once
def test_compare(command_environment):
    pytest.importorskip("transformers", reason="the library to compare with")
    backend = keras.config.backend()
    result = run(
        command_environment,
        *("--dtype", "float32", "--prompt", "4", "--new", "6", "--batch", "2"),
        *("--libraries", "keras_gemma", "transformers", "llama_cpp", "--backends", backend),
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    ours, theirs, llama = (json.loads(line) for line in lines if line.startswith("{"))
    assert (ours["library"], ours["backend"]) == ("keras_gemma", backend)
    assert ours["ids"] == theirs["ids"] and len(ours["ids"]) == 6
    assert ours["tokens_per_second"] > 0 and ours["bandwidth_gb_per_second"] > 0
    assert "one prompt at a time" in llama["error"]
    assert f"x {backend}" in result.stdout


@pytest.mark.once
def test_compare_in_4_bits(command_environment):
    backend = keras.config.backend()
    result = run(
        command_environment,
        *("--quantization", "int4", "--embedding", "int4", "--prompt", "4", "--new", "6"),
        *("--libraries", "keras_gemma", "transformers", "--backends", backend),
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    (ours,) = (json.loads(line) for line in lines if line.startswith("{"))
    assert ours["quantization"] == "int4" and len(ours["ids"]) == 6
    assert ours["tokens_per_second"] > 0 and 0 <= ours["mbu"] < 1
    assert "transformers has no int4 here" in lines


@pytest.mark.once
def test_a_folder_of_other_weights(command_environment, tmp_path):
    (tmp_path / "sizes.json").write_text("{}")
    result = run(command_environment, "--folder", str(tmp_path), "--libraries", "keras_gemma")
    assert result.returncode == 1
    assert "holds other weights" in result.stderr
