"""Exported programs generate the same greedy text as `generate`, without Keras."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_gemma
from tests.models import make_lm

EXAMPLES = Path(__file__).parents[2] / "examples" / "exported"
BACKENDS = {"torch": "torch", "jax": "jax", "onnx": "torch"}
"""Backend that writes each format."""

PROMPTS = ["To be, or not to be", "the slings and arrows of outrageous"]
PROGRAM = """
import importlib.abc, runpy, sys
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("keras", "keras_gemma"):
            raise ImportError(name + " must not be imported")
sys.meta_path.insert(0, Blocker())
sys.argv = sys.argv[1:]
sys.path.insert(0, {examples!r})
runpy.run_path(sys.argv[0], run_name="__main__")
unexpected = {others} & set(sys.modules)
if unexpected:
    raise SystemExit("also imported: " + str(unexpected))
"""


def skip_without_packages(format):
    for name in {"torch": ["torch"], "jax": ["jax"], "onnx": ["torch", "onnxscript"]}[format]:
        pytest.importorskip(name)


def formats_of_this_backend(*formats):
    """Returns those of `formats` that the current backend writes."""
    return [name for name in formats if BACKENDS[name] == keras.config.backend()]


def format_of_another_backend():
    """Returns the fastest format to write in a subprocess, if no test writes it in this process."""
    return ["jax"] if keras.config.backend() == "tensorflow" else []


def run_in_process(folder, format, prompts, max_new_tokens, monkeypatch):
    """Returns the texts that an export generates in this process."""
    monkeypatch.syspath_prepend(EXAMPLES)
    greedy = importlib.import_module("greedy")
    runtime = importlib.import_module(f"run_{format}")
    return greedy.complete(folder, prompts, max_new_tokens, runtime.load)


def run_in_subprocess(folder, format, prompts, max_new_tokens):
    """Returns the output of the example in a process without Keras and other runtimes."""
    others = {"torch", "jax", "tensorflow"} - {format}
    code = PROGRAM.format(others=others, examples=str(EXAMPLES))
    script = str(EXAMPLES / f"run_{format}.py")
    options = ["--max-new-tokens", str(max_new_tokens)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, script, str(folder), *prompts, *options],
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


LINES = """First Citizen:
Before we proceed any further, hear me speak.

All:
Speak, speak.

First Citizen:
You are all resolved rather to die than to famish?

All:
"""


@pytest.fixture(scope="module")
def built_in():
    """The built-in model, a long and a short prompt, and the generated texts."""
    lm = keras_gemma.GemmaCausalLM.from_preset("gemma_tiny_en", dtype="float32")
    lm.compile(run_eagerly=keras.config.backend() == "torch")
    prompts = [LINES, "ROMEO:"]
    rows = lm.preprocessor.tokenize_prompts(prompts)
    assert len(rows[0]) > lm.backbone.config.sliding_window_size > len(rows[1])
    return lm, prompts, lm.generate(prompts, max_new_tokens=20)


@pytest.mark.parametrize(
    "format", formats_of_this_backend("torch", "jax", "onnx") + format_of_another_backend()
)
def test_built_in_model(format, built_in, tmp_path):
    skip_without_packages(format)
    lm, prompts, expected = built_in
    if format == "onnx":  # computes in float32 with bfloat16 weights
        lm = keras_gemma.GemmaCausalLM.from_preset("gemma_tiny_en", dtype="bfloat16")
    options = {"batch_size": None} if format == "jax" else {}
    lm.export(tmp_path / "out", format=format, **options)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"metadata.json", "vocabulary.spm"} <= names
    assert not [name for name in names if name.startswith(".")]
    size = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    weights = sum(weight.bytes for weight in lm.backbone.named_weights().values())
    assert size < 1.1 * weights + 1_000_000  # the weights are stored once
    output = run_in_subprocess(tmp_path / "out", format, prompts, 20)
    assert output == "".join(f"{text}\n" for text in expected)


def remove_stop_tokens(folder):
    """Removes the stop tokens of an export."""
    path = folder / "metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "stop_token_ids": []}))


@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.parametrize("format", formats_of_this_backend("torch", "jax"))
def test_quantized(format, mode, tiny_proto, tmp_path, monkeypatch):
    lm = make_lm("gemma1_wide_heads", tiny_proto)
    lm.quantize(mode, group_size=16)
    lm.export(tmp_path / "out", format=format, **({"batch_size": 2} if format == "jax" else {}))
    remove_stop_tokens(tmp_path / "out")
    expected = lm.generate(PROMPTS, max_new_tokens=8, stop_token_ids=None)
    assert run_in_process(tmp_path / "out", format, PROMPTS, 8, monkeypatch) == expected
    if format == "jax":
        from safetensors.numpy import load_file

        values = load_file(tmp_path / "out" / "weights.safetensors")["layers.0.query.values"]
        assert values.dtype == {"int8": np.int8, "int4": np.uint8}[mode]
    else:
        import torch

        program = torch.export.load(tmp_path / "out" / "program.pt2")
        dtype = program.state_dict["layers_0_query_values"].dtype
        assert dtype == {"int8": torch.int8, "int4": torch.int32}[mode]


@pytest.mark.parametrize("format", formats_of_this_backend("torch", "jax"))
def test_bfloat16(format, tiny_proto, tmp_path, monkeypatch):
    lm = make_lm("gemma1_multi_query", tiny_proto, dtype="bfloat16")
    lm.export(tmp_path / "out", format=format)
    metadata = json.loads((tmp_path / "out" / "metadata.json").read_text())
    assert metadata["inputs"]["cache"][0] == "bfloat16"
    (text,) = run_in_process(tmp_path / "out", format, PROMPTS[:1], 4, monkeypatch)
    assert text.startswith(PROMPTS[0])


@pytest.mark.parametrize("format", list(keras_gemma.export.FORMATS))
def test_model_without_preprocessor(format, tmp_path):
    with pytest.raises(ValueError, match=r"GemmaCausalLM\(backbone, preprocessor\)"):
        make_lm().export(tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", list(keras_gemma.export.FORMATS))
def test_missing_package(format, tiny_proto, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "\.\['):
        make_lm(proto=tiny_proto).export(tmp_path / "out", format=format)


def test_onnx_refuses_quantized_model(tiny_proto, tmp_path):
    skip_without_packages("onnx")
    lm = make_lm("gemma2_grouped", tiny_proto)
    lm.quantize("int8")
    with pytest.raises(ValueError, match=r"onnxruntime\.quantization.*Received: a model in int8"):
        lm.export(tmp_path / "out", format="onnx")


@pytest.mark.parametrize("batch_size", [0, 1.5, True, "2"])
def test_invalid_batch_size(batch_size, tiny_proto, tmp_path):
    with pytest.raises(ValueError, match="`batch_size` must be a positive integer"):
        make_lm(proto=tiny_proto).export(tmp_path / "out", format="jax", batch_size=batch_size)


def test_error_of_subprocess(tiny_proto, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(
        keras_gemma.export.subprocess_export, "PROGRAM", "raise SystemExit('no such thing')"
    )
    other = "jax" if keras.config.backend() != "jax" else "torch"
    skip_without_packages(other)
    with pytest.raises(RuntimeError, match=r"exited with code 1\.(?s:.*)no such thing"):
        make_lm(proto=tiny_proto).export(tmp_path / "out", format=other)
    assert not (tmp_path / "out").exists()
