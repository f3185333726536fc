"""Built-in presets: sizes, handles and cached files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from keras_gemma import catalogue, models
from keras_gemma.config import GemmaConfig
from keras_gemma.models import (
    GemmaBackbone,
    GemmaCausalLM,
    GemmaCausalLMPreprocessor,
    GemmaPreprocessor,
)
from keras_gemma.storage.keras_preset import layout as keras_layout
from keras_gemma.storage.keras_preset import writer as keras_writer
from keras_gemma.tokenizers import GemmaTokenizer
from tests.model.sizes import PUBLISHED
from tests.storage.hubs import lay_out_hugging_face, lay_out_kaggle

ROOT = Path(__file__).parents[1]

FAMILIES = {
    "gemma_2b": (
        2_506_172_416,
        "gemma_2b_en gemma_instruct_2b_en gemma_1.1_instruct_2b_en",
        "code_gemma_2b_en code_gemma_1.1_2b_en",
    ),
    "gemma_7b": (
        8_537_680_896,
        "gemma_7b_en gemma_instruct_7b_en gemma_1.1_instruct_7b_en",
        "code_gemma_7b_en code_gemma_instruct_7b_en code_gemma_1.1_instruct_7b_en",
    ),
    "gemma2_2b": (
        2_614_341_888,
        "gemma2_2b_en gemma2_instruct_2b_en shieldgemma_2b_en c2s_scale_gemma_2_2b_en",
    ),
    "gemma2_9b": (9_241_705_984, "gemma2_9b_en gemma2_instruct_9b_en shieldgemma_9b_en"),
    "gemma2_27b": (
        27_227_128_320,
        "gemma2_27b_en gemma2_instruct_27b_en shieldgemma_27b_en c2s_scale_gemma_2_27b_en",
    ),
    "vaultgemma_1b": (1_038_741_120, "vault_gemma_1b_en"),
    "gemma3_270m": (268_098_176, "gemma3_270m gemma3_instruct_270m function_gemma_instruct_270m"),
    "gemma3_1b": (999_885_952, "gemma3_1b gemma3_instruct_1b"),
    "gemma3_4b": (3_880_099_328, "gemma3_4b_text gemma3_instruct_4b_text translategemma_4b_it"),
    "gemma3_12b": (
        11_765_788_416,
        "gemma3_12b_text gemma3_instruct_12b_text translategemma_12b_it",
    ),
    "gemma3_27b": (
        27_009_002_240,
        "gemma3_27b_text gemma3_instruct_27b_text translategemma_27b_it",
        "medgemma_instruct_27b_text",
    ),
}
"""The shape of `tests/model/sizes.py` to its parameters, and to the presets that have it."""

SHAPES = [
    (name, shape, parameters)
    for shape, (parameters, *lines) in FAMILIES.items()
    for name in " ".join(lines).split()
]


CONTEXT_LENGTHS = {
    "vaultgemma_1b": 1024,
    "gemma3_270m": 32_768,
    "gemma3_1b": 32_768,
    "gemma3_4b": 131_072,
    "gemma3_12b": 131_072,
    "gemma3_27b": 131_072,
}
BUILT_IN = {"gemma_tiny_en", "gemma_tiny_instruct_en"}
INSTALLED = {"gemma3_270m_q4_k_m"}
"""Presets whose weights are separate Python packages."""


def test_every_name_has_a_folder():
    assert len(SHAPES) == 38
    assert set(catalogue.presets()) == {name for name, _, _ in SHAPES} | BUILT_IN | INSTALLED


@pytest.mark.parametrize(("name", "shape", "parameters"), SHAPES)
def test_sizes(name, shape, parameters):
    preset = catalogue.presets()[name]
    assert preset.config == GemmaConfig(**PUBLISHED[shape][0])
    assert preset.config.parameter_count == parameters
    metadata = json.loads((preset.folder / "metadata.json").read_text())
    assert metadata["parameter_count"] == parameters
    assert metadata["context_length"] == CONTEXT_LENGTHS.get(shape, 8192)
    assert preset.describe()["metadata"]["context_length"] == metadata["context_length"]
    assert preset.dtype == "bfloat16"


def test_handles_are_those_of_keras_hub():
    from keras_hub.src.models.gemma import gemma_presets
    from keras_hub.src.models.gemma3 import gemma3_presets

    theirs = gemma_presets.backbone_presets | gemma3_presets.backbone_presets
    ours = GemmaCausalLM.presets
    for name, _, parameters in SHAPES:
        assert ours[name]["kaggle_handle"] == theirs[name]["kaggle_handle"]
        assert ours[name]["metadata"]["params"] == parameters
        if not name.startswith("translategemma"):  # KerasHub counts the vision encoder
            assert theirs[name]["metadata"]["params"] == parameters
        assert ours[name]["metadata"]["path"] == theirs[name]["metadata"]["path"]
        assert ours[name]["metadata"]["description"] != theirs[name]["metadata"]["description"]


def test_twins_and_licenses():
    presets = catalogue.presets()
    twins = [preset.hugging_face_handle for preset in presets.values()]
    assert len(set(twins)) == len(SHAPES) + 1  # None for those that come with the package
    assert presets["gemma_1.1_instruct_7b_en"].hugging_face_handle == "hf://google/gemma-1.1-7b-it"
    for name, preset in presets.items():
        is_c2s, is_tiny = name.startswith("c2s_"), name in BUILT_IN
        license = "cc-by-4.0" if is_c2s else "Apache-2.0" if is_tiny else "gemma"
        if name.startswith("medgemma"):
            license = "health-ai-developer-foundations"
        assert preset.license == license
        owner = "vandijklab" if is_c2s else "google"
        assert (
            is_tiny or name in INSTALLED or preset.hugging_face_handle.startswith(f"hf://{owner}/")
        )


@pytest.mark.parametrize("cls", [GemmaBackbone, GemmaCausalLM, GemmaPreprocessor, GemmaTokenizer])
def test_presets_are_data_of_every_class(cls):
    assert cls.presets == GemmaCausalLM.presets
    assert cls.presets["gemma_tiny_en"]["kaggle_handle"] is None


@pytest.mark.parametrize("name", ["gemma2_27b_en", "vault_gemma_1b_en", "gemma3_1b"])
def test_folders_are_what_would_be_saved(name, tiny_proto, monkeypatch):
    from keras_gemma.backend import uninitialized

    folder = catalogue.presets()[name].folder
    family = catalogue.presets()[name].config.family
    prefix = family.lower()
    # No numbers, which would take 50 GB.
    monkeypatch.setattr("keras_gemma.storage.presets.randomize", lambda *arguments: None)
    with uninitialized():
        backbone = getattr(models, f"{family}Backbone").from_preset(name, load_weights=False)
    tokenizer = GemmaTokenizer(tiny_proto, name=f"{prefix}_tokenizer")
    preprocessor = GemmaCausalLMPreprocessor(tokenizer, name=f"{prefix}_causal_lm_preprocessor")
    for file, content in (
        (keras_layout.CONFIG, keras_writer.backbone_object(backbone)),
        (keras_layout.TOKENIZER, keras_writer.tokenizer_object(tokenizer, family)),
        (keras_layout.PREPROCESSOR, keras_writer.preprocessor_object(preprocessor, family)),
    ):
        assert json.loads((folder / file).read_text()) == content


def test_names_and_handles():
    vault = catalogue.presets()["vault_gemma_1b_en"]
    handle = "kaggle://keras/vaultgemma/keras/vault_gemma_1b_en"
    for preset in (vault.name, vault.kaggle_handle, handle, f"{handle}/1"):
        assert catalogue.find(preset) is vault
    assert catalogue.find("gemma_tiny_en").config.context_length == 256
    for preset in (f"{handle}2", "vault", "", "/", "/1", handle.removeprefix("kaggle:"), Path("x")):
        assert catalogue.find(preset) is None


def test_keras_hub_reads_the_folders():
    from keras_hub.src.utils.preset_utils import load_json

    for preset in catalogue.presets().values():
        assert load_json(str(preset.folder))["registered_name"] == (
            f"keras_hub>{preset.config.family}Backbone"
        )


def test_cached_presets(tmp_path, monkeypatch):
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "kagglehub"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.delenv("HUGGINGFACE_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    presets = catalogue.presets()
    tiny = presets["gemma_tiny_en"].folder
    assert not any(preset.is_cached() for preset in presets.values())
    assert {name for name, preset in presets.items() if preset.has_weights} == BUILT_IN

    hub = tmp_path / "hf" / "hub"
    lay_out_kaggle(tmp_path / "kagglehub", "keras/gemma/keras/gemma_2b_en/3", tiny)
    lay_out_kaggle(tmp_path / "kagglehub", "keras/gemma/keras/gemma_7b_en/4", tiny, whole=True)
    lay_out_kaggle(tmp_path / "kagglehub", "keras/gemma2/keras/gemma2_9b_en/3", tiny)  # another
    lay_out_hugging_face(hub, "google/gemma-2-2b", tiny)
    lay_out_hugging_face(hub, "google/gemma-2-9b", tiny, names=["config.json"])
    cached = {name for name, preset in presets.items() if preset.is_cached()}
    assert cached == {"gemma_2b_en", "gemma_7b_en", "gemma2_2b_en"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "home/.cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
        ({"HF_HOME": "/h", "XDG_CACHE_HOME": "/x"}, "/h/hub"),
        ({"HF_HUB_CACHE": "~/c", "HF_HOME": "/h"}, "home/c"),
    ],
)
def test_cache_path_equals_that_of_huggingface_hub(
    variables, expected, tmp_path, command_environment
):
    """Ours and the client's own answer, in a process that starts with these variables."""
    names = ("XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")
    environment = {k: v for k, v in command_environment.items() if k not in names}
    code = (
        "import sys; sys.argv[0] = 'keras-gemma'; from huggingface_hub.constants import *;"
        "from keras_gemma.hub_caches import hugging_face_cache;"
        "print(hugging_face_cache()); print(HF_HUB_CACHE)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, **variables, "HOME": str(tmp_path / "home")},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.stdout.split() == [str(tmp_path / expected)] * 2, result.stderr


def test_invalid_weights_index(tmp_path):
    from keras_gemma.hub_caches import shard_names

    index = tmp_path / "model.weights.json"
    for content in ("{", "[]", '{"weight_map": 3}', '{"weight_map": {"/a": 3}}'):
        index.write_text(content)
        with pytest.raises(ValueError, match=r"is not a valid weights index.*Delete it"):
            shard_names(index)
    index.write_text('{"weight_map": {"/a": ["b.h5", "a.h5"], "/b": "a.h5"}}')
    assert shard_names(index) == ["a.h5", "b.h5"]
    for name in ("../a.h5", "/a.h5", "", ".", "..", "a\\b"):
        index.write_text(json.dumps({"weight_map": {"/a": name}}))
        with pytest.raises(ValueError, match="do not trust"):
            shard_names(index)
