"""The names that a notebook finds, and what importing them brings along."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import keras_gemma
from keras_gemma.backend_choice import BACKENDS

ROOT = Path(__file__).parents[1]

MODELS = (
    "GemmaBackbone",
    "GemmaCausalLM",
    "GemmaCausalLMPreprocessor",
    "GemmaPreprocessor",
    "GemmaTokenizer",
)


@pytest.mark.parametrize("module", ["", ".models", ".samplers", ".tokenizers", ".training"])
def test_every_listed_name_exists(module):
    loaded = importlib.import_module(f"keras_gemma{module}")
    assert [name for name in loaded.__all__ if not hasattr(loaded, name)] == []


def test_keras_hub_names_exist():
    for name in MODELS:
        assert getattr(keras_gemma.models, name) is getattr(keras_gemma, name)
    assert keras_gemma.tokenizers.GemmaTokenizer is keras_gemma.GemmaTokenizer
    assert {"from_keras_hub", "to_keras_hub", "upload_preset"} <= set(keras_gemma.__all__)
    assert set(keras_gemma.samplers.__all__) >= {
        "BeamSampler",
        "ContrastiveSampler",
        "GreedySampler",
        "MinPSampler",
        "RandomSampler",
        "TopKSampler",
        "TopPSampler",
        "deserialize",
        "get",
        "serialize",
    }


def test_base_classes_of_keras_hub():
    """Its `CausalLM.from_preset` gives the class that a preset names; ours are all Gemma's."""
    for name in ("Backbone", "CausalLM", "CausalLMPreprocessor", "Tokenizer"):
        assert getattr(keras_gemma.models, name) is getattr(keras_gemma, f"Gemma{name}")
    assert keras_gemma.models.Preprocessor is keras_gemma.GemmaCausalLMPreprocessor
    assert keras_gemma.tokenizers.Tokenizer is keras_gemma.GemmaTokenizer
    tokenizer = keras_gemma.models.Tokenizer.from_preset("gemma_tiny_en")
    assert type(tokenizer) is keras_gemma.GemmaTokenizer


def run(code, environment):
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True
    )


def test_import_is_light(command_environment):
    """No hub, no terminal library, no framework but the one that Keras runs on."""
    backend = command_environment["KERAS_BACKEND"]
    code = (
        "import sys, keras; before = set(sys.modules); import keras_gemma;"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    result = run(code, command_environment)
    assert result.returncode == 0, result.stderr
    heavy = {"kagglehub", "huggingface_hub", "transformers", "typer", "keras_hub"}
    heavy |= {*BACKENDS, "tensorflow_text"} - {backend}
    assert heavy.isdisjoint(result.stdout.split())


@pytest.mark.once
def test_chooses_a_backend_before_keras(command_environment):
    del command_environment["KERAS_BACKEND"]
    code = (
        "import importlib.util, keras_gemma, keras;"
        f"first = next(b for b in {BACKENDS} if importlib.util.find_spec(b));"
        "sys = __import__('sys'); sys.exit(keras.config.backend() != first)"
    )
    result = run(code, command_environment)
    assert result.returncode == 0, result.stderr
