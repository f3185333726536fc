"""Scripts of `examples/benchmarks`, on a model of two layers."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import keras
import pytest

from keras_gemma.storage.gguf.writer import save_to_gguf
from tests.conftest import TEXTS
from tests.models import make_lm

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
    assert "transformers is not measured in int4" in lines


@pytest.mark.once
def test_folder_with_other_weights(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(COMPARE.parent)
    compare = importlib.import_module("compare")
    (tmp_path / "sizes.json").write_text("{}")
    options = ["--tiny", "--folder", str(tmp_path), "--one", "checkpoints"]
    monkeypatch.setattr("sys.argv", ["compare.py", *options])
    with pytest.raises(ValueError, match="has other weights"):
        compare.main()


def test_kernels(monkeypatch, capsys):
    monkeypatch.syspath_prepend(COMPARE.parent)
    kernels = importlib.import_module("kernels")
    monkeypatch.setattr(kernels, "MAX_MATRICES", 1)
    monkeypatch.setattr(kernels, "MIN_SECONDS", 1e-6)
    monkeypatch.setattr("keras_gemma.backend.memory_bandwidth", lambda: 47e9)
    monkeypatch.setattr("sys.argv", ["kernels.py", "--shape", "gemma_tiny_en", "--rows", "1", "8"])
    kernels.main()
    title, head, *lines = capsys.readouterr().out.splitlines()
    assert title == "memory bandwidth 47 GB/s"
    assert head.split()[-4:] == ["1", "rows", "8", "rows"]
    assert len(lines) == 6 * 3
    assert lines[3].startswith("key, value    128 x 192     packed")


@pytest.mark.once
def test_perplexity(command_environment, tmp_path, tiny_proto):
    """llama.cpp agrees. transformers does not read the query scale from a GGUF file."""
    pytest.importorskip("llama_cpp", reason="the library to compare with")
    path = tmp_path / "tiny.gguf"
    save_to_gguf(make_lm("gemma3", tiny_proto, num_layers=8), path, "f16")
    (tmp_path / "text.txt").write_text(" ".join(TEXTS))
    script = COMPARE.with_name("perplexity.py")
    command = [sys.executable, script, tmp_path / "text.txt", "--model", path, "--window", "32"]
    result = subprocess.run(
        [*command, "--precisions", "float32", "--libraries", "keras_gemma", "llama_cpp"],
        env={**command_environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    lines = result.stdout.splitlines()[1:]
    assert len(lines) == 2, result.stderr
    ours, theirs = (float(line[34:46]) for line in lines)
    assert theirs == pytest.approx(ours, rel=0.02)
