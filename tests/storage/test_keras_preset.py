"""Reading of KerasHub's folders, valid and invalid."""

import json
import shutil

import h5py
import keras
import numpy as np
import pytest

from keras_gemma.config import GemmaConfig
from keras_gemma.model.backbone import GemmaBackbone
from keras_gemma.storage import save
from keras_gemma.text.preprocessor import GemmaCausalLMPreprocessor
from keras_gemma.text.tokenizer import GemmaTokenizer
from tests.configurations import CONFIGURATIONS, GEMMA1, GEMMA2
from tests.storage.conftest import (
    Task,
    assert_close,
    assert_same_weights,
    make_backbone,
    make_keras_hub_backbone,
    outputs,
)
from tests.storage.keras_hub_weights import KERAS_HUB_IS_WRONG, assert_same_as_keras_hub


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_reads_what_keras_hub_writes(name, tmp_path):
    theirs = make_keras_hub_backbone(CONFIGURATIONS[name])
    theirs.save_to_preset(tmp_path / "preset")
    ours = GemmaBackbone.from_preset(tmp_path / "preset")
    assert ours.config == GemmaConfig(**CONFIGURATIONS[name])
    assert_same_as_keras_hub(ours, theirs)
    if name not in KERAS_HUB_IS_WRONG:
        assert_close(outputs(ours), outputs(theirs))


def test_reads_the_earlier_registered_names(tmp_path):
    ours = make_backbone(GEMMA1)
    ours.save_to_preset(tmp_path)
    edit(tmp_path / "config.json", module="keras_nlp.src.models.gemma", dtype="bfloat16")
    edit(tmp_path / "config.json", registered_name="keras_nlp>GemmaBackbone")
    loaded = GemmaBackbone.from_preset(tmp_path)
    assert loaded.dtype_policy.name == "bfloat16"
    assert_same_weights(loaded, ours)


def test_slices_a_padded_vocabulary(tmp_path):
    ours = make_backbone(GEMMA1)
    ours.save_to_preset(tmp_path)
    with h5py.File(tmp_path / "model.weights.h5", "a") as file:
        embedding = file["layers/reversible_embedding/vars"]
        rows = embedding["0"][...]
        del embedding["0"]
        embedding["0"] = np.concatenate([rows, np.zeros((128, rows.shape[1]), "float32")])
    assert_same_weights(GemmaBackbone.from_preset(tmp_path), ours)


def test_dtype_and_load_weights(tmp_path):
    ours = make_backbone(GEMMA1, dtype="bfloat16")
    ours.save_to_preset(tmp_path)
    wide = GemmaBackbone.from_preset(tmp_path, dtype="float32")
    assert wide.dtype_policy.name == "float32"
    assert {w.dtype for w in wide.named_weights().values()} == {"float32"}
    assert_same_weights(wide, ours)
    keras.config.set_dtype_policy("float32")
    assert GemmaBackbone.from_preset(tmp_path).dtype_policy.name == "bfloat16"
    mixed = GemmaBackbone.from_preset(tmp_path, dtype="mixed_bfloat16")
    assert mixed.dtype_policy.name == "mixed_bfloat16"

    (tmp_path / "model.weights.h5").unlink()
    fresh = GemmaBackbone.from_preset(tmp_path, load_weights=False)
    assert np.ptp(fresh.named_weights()["token_embedding"].numpy().astype("float32")) > 0
    with pytest.raises(FileNotFoundError, match=r"model\.weights\.h5 and model\.weights\.json"):
        GemmaBackbone.from_preset(tmp_path)


def test_mixed_policy_round_trip(tmp_path):
    make_backbone(GEMMA1, dtype="mixed_bfloat16").save_to_preset(tmp_path)
    assert GemmaBackbone.from_preset(tmp_path).dtype_policy.name == "mixed_bfloat16"


def test_each_tensor_is_read_once(tmp_path, monkeypatch):
    from keras_gemma.storage import tensor_streaming as checkpoint

    make_backbone(GEMMA2).save_to_preset(tmp_path)
    reads = []
    original = checkpoint.StoredTensor.__init__

    def counting(self, shape, dtype, read):
        original(self, shape, dtype, lambda: reads.append(shape) or read())

    monkeypatch.setattr(checkpoint.StoredTensor, "__init__", counting)
    backbone = GemmaBackbone.from_preset(tmp_path)
    assert len(reads) == len(backbone.named_weights())


def edit(path, remove=(), registered_name=None, class_name=None, module=None, **config):
    content = json.loads(path.read_text())
    for key, value in (
        ("registered_name", registered_name),
        ("class_name", class_name),
        ("module", module),
    ):
        if value is not None:
            content[key] = value
    content["config"].update(config)
    for key in remove:
        del content["config"][key]
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_name": "LlamaBackbone"}, "LlamaBackbone.*reads GemmaBackbone"),
        ({"flavour": 1, "taste": 2}, "flavour, taste"),
        ({"remove": ["head_dim", "num_layers"]}, "lacks num_layers, head_dim"),
        ({"num_query_heads": 0}, "num_query_heads=0"),
        ({"num_key_value_heads": 3}, "multiple of `num_key_value_heads`"),
        (
            {"dtype": {"class_name": "QuantizedDTypePolicy", "config": {"mode": "int8"}}},
            "Quantized.*before it is quantized",
        ),
    ],
)
def test_invalid_configurations(change, message, preset):
    edit(preset / "config.json", **change)
    with pytest.raises(ValueError, match=message):
        GemmaBackbone.from_preset(preset)


def test_all_wrong_tensors_are_listed_and_nothing_is_built(preset, monkeypatch):
    with h5py.File(preset / "model.weights.h5", "a") as file:
        del file["layers/rms_normalization/vars/0"]
        block = file["layers/gemma_decoder_block_1"]
        block["ffw_linear/vars/1"] = np.zeros(3)
        for path, value in (("gating_ffw", np.zeros((48, 32))), ("gating_ffw_2", np.zeros(2, int))):
            del block[f"{path}/vars/0"]
            block[f"{path}/vars/0"] = value.reshape(-1, 2) if value.dtype == int else value

    def never(self):
        raise AssertionError("built before the tensors were compared")

    monkeypatch.setattr(GemmaBackbone, "__init__", never)
    with pytest.raises(ValueError) as error:
        GemmaBackbone.from_preset(preset)
    for text in (
        "4 problems",
        "missing: layers/rms_normalization/vars/0 (32,)",
        "shape: layers/gemma_decoder_block_1/gating_ffw/vars/0 is (48, 32), expected (32, 48)",
        "shape: layers/gemma_decoder_block_1/gating_ffw_2/vars/0",
        "unexpected: layers/gemma_decoder_block_1/ffw_linear/vars/1 (3,)",
    ):
        assert text in str(error.value)


def test_tensors_of_non_float_dtype(preset):
    with h5py.File(preset / "model.weights.h5", "a") as file:
        group = file["layers/rms_normalization/vars"]
        del group["0"]
        group["0"] = np.zeros(32, "int8")
    with pytest.raises(ValueError, match=r"rms_normalization/vars/0 is int8"):
        GemmaBackbone.from_preset(preset)


def test_more_layers_than_the_weights_have(preset):
    with pytest.raises(ValueError, match=r"missing: layers/gemma_decoder_block_2/attention"):
        GemmaBackbone.from_preset(preset, num_layers=3)


def test_truncated_file(preset):
    path = preset / "model.weights.h5"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"model\.weights\.h5 cannot be read as an H5 file"):
        GemmaBackbone.from_preset(preset)


def test_tensors_outside_the_file_are_not_read(preset):
    with h5py.File(preset / "model.weights.h5", "a") as file:
        group = file["layers/rms_normalization/vars"]
        del group["0"]
        group["0"] = h5py.ExternalLink("elsewhere.h5", "/secret")
    with pytest.raises(ValueError, match=r"missing: layers/rms_normalization"):
        GemmaBackbone.from_preset(preset)
    with h5py.File(preset / "model.weights.h5", "a") as file:
        group = file["layers/rms_normalization/vars"]
        del group["0"]
        group.create_dataset("0", (32,), "float32", external=[("secret.bin", 0, 128)])
    with pytest.raises(ValueError, match="do not trust this preset"):
        GemmaBackbone.from_preset(preset)


def test_shards_that_are_missing_or_elsewhere(tmp_path):
    save(make_backbone(GEMMA2), tmp_path, max_shard_size="70KB")
    assert len(list(tmp_path.glob("model_*.weights.h5"))) > 2
    (tmp_path / "model_00001.weights.h5").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 are missing: model_00001\.weights\.h5"):
        GemmaBackbone.from_preset(tmp_path)

    index = tmp_path / "model.weights.json"
    content = json.loads(index.read_text())
    content["weight_map"]["/layers/rms_normalization/vars"] = "../secret.weights.h5"
    index.write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"'\.\./secret\.weights\.h5', which is not directly in its folder"
    ):
        GemmaBackbone.from_preset(tmp_path)
    index.write_text("{}")
    with pytest.raises(ValueError, match="`weight_map` is missing"):
        GemmaBackbone.from_preset(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "preprocessor.json"])
def test_invalid_json(name, preset):
    (preset / name).write_text("{'single quotes'}")
    with pytest.raises(ValueError, match=rf"{name} is not valid JSON"):
        Task.from_preset(preset)
    (preset / name).write_text("[1]")
    with pytest.raises(ValueError, match=rf"{name} must hold a JSON object"):
        Task.from_preset(preset)


def test_tokenizers_of_other_models(preset):
    edit(preset / "tokenizer.json", class_name="LlamaTokenizer")
    with pytest.raises(ValueError, match="LlamaTokenizer"):
        GemmaTokenizer.from_preset(preset)
    edit(preset / "preprocessor.json", class_name="LlamaCausalLMPreprocessor")
    with pytest.raises(ValueError, match="LlamaCausalLMPreprocessor"):
        GemmaCausalLMPreprocessor.from_preset(preset)
    shutil.rmtree(preset / "assets")
    with pytest.raises(ValueError, match=r"looked for assets/tokenizer/vocabulary\.spm"):
        GemmaTokenizer.from_preset(preset)
