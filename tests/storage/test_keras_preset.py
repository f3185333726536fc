"""KerasHub's folder: what KerasHub writes we read, what we write KerasHub reads."""

import json
import shutil

import h5py
import keras
import numpy as np
import pytest
from keras import ops

from keras_gemma.config import GemmaConfig
from keras_gemma.model.backbone import GemmaBackbone
from keras_gemma.storage import keras_layout, save
from keras_gemma.storage.keras_writer import parse_size
from keras_gemma.text.preprocessor import GemmaCausalLMPreprocessor
from keras_gemma.text.tokenizer import GemmaTokenizer
from tests.configurations import CONFIGURATIONS, GEMMA1, GEMMA2
from tests.storage.conftest import (
    Task,
    assert_close,
    assert_same_weights,
    make_backbone,
    make_keras_hub_backbone,
    make_task,
    outputs,
)

# KerasHub leaves the vocabulary's file to the garbage collector.
leaves_a_file_open = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

# KerasHub ignores the 27B models' query scale and the blocks' epsilon.
KERAS_HUB_IS_WRONG = ("gemma2_27b_scale", "gemma2_epsilon")


def assert_same_as_keras_hub(ours, theirs):
    """Compare every weight by KerasHub's attributes, not by the table under test."""
    weights = {name: weight.numpy() for name, weight in ours.named_weights().items()}

    def same(name, value, change):
        expected = change(ops.convert_to_numpy(value).astype("float32"))
        np.testing.assert_array_equal(weights[name].astype("float32"), expected, err_msg=name)

    d = ours.config.hidden_dim
    same("token_embedding", theirs.token_embedding.embeddings, lambda w: w)
    same("final_norm", theirs.layer_norm.scale, lambda w: w)
    for i, block in enumerate(theirs.transformer_layers):
        attention = block.attention
        for name, dense in (
            ("query", attention.query_dense),
            ("key", attention.key_dense),
            ("value", attention.value_dense),
        ):
            rows = lambda w: np.concatenate([head.T for head in w])  # noqa: E731
            same(f"layers.{i}.{name}", dense.kernel, rows)
        same(f"layers.{i}.output", attention.output_dense.kernel, lambda w: w.reshape(-1, d).T)
        same(f"layers.{i}.gate", block.gating_ffw.kernel, np.transpose)
        same(f"layers.{i}.up", block.gating_ffw_2.kernel, np.transpose)
        same(f"layers.{i}.down", block.ffw_linear.kernel, np.transpose)
        same(f"layers.{i}.pre_attention_norm", block.pre_attention_norm.scale, lambda w: w)
        same(f"layers.{i}.pre_ffw_norm", block.pre_ffw_norm.scale, lambda w: w)
        if ours.config.use_post_attention_norm:
            same(f"layers.{i}.post_attention_norm", block.post_attention_norm.scale, lambda w: w)
        if ours.config.use_post_ffw_norm:
            same(f"layers.{i}.post_ffw_norm", block.post_ffw_norm.scale, lambda w: w)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_reads_what_keras_hub_writes(name, tmp_path):
    theirs = make_keras_hub_backbone(CONFIGURATIONS[name])
    theirs.save_to_preset(tmp_path / "preset")
    ours = GemmaBackbone.from_preset(tmp_path / "preset")
    assert ours.config == GemmaConfig(**CONFIGURATIONS[name])
    assert_same_as_keras_hub(ours, theirs)
    if name not in KERAS_HUB_IS_WRONG:
        assert_close(outputs(ours), outputs(theirs))


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_keras_hub_reads_what_we_write(name, tmp_path):
    import keras_hub

    ours = make_backbone(CONFIGURATIONS[name])
    ours.save_to_preset(tmp_path / "preset")
    theirs = keras_hub.models.GemmaBackbone.from_preset(str(tmp_path / "preset"))
    assert_same_as_keras_hub(ours, theirs)
    if name not in KERAS_HUB_IS_WRONG:
        assert_close(outputs(ours), outputs(theirs))


@pytest.mark.parametrize("sharded", [False, True])
def test_bfloat16_and_shards_in_both_directions(sharded, tmp_path):
    import keras_hub

    theirs = make_keras_hub_backbone(GEMMA2, dtype="bfloat16")
    size = 40_000 if sharded else 10**9
    theirs.save_to_preset(tmp_path / "theirs", max_shard_size=size / 2**30)
    ours = GemmaBackbone.from_preset(tmp_path / "theirs")
    assert ours.dtype_policy.name == "bfloat16"
    assert_same_as_keras_hub(ours, theirs)

    save(ours, tmp_path / "ours", max_shard_size=size)
    files = sorted(path.name for path in (tmp_path / "ours").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert ("model_00001.weights.h5" in files) == sharded
    back = keras_hub.models.GemmaBackbone.from_preset(str(tmp_path / "ours"))
    assert_same_as_keras_hub(ours, back)
    again = GemmaBackbone.from_preset(tmp_path / "ours")
    assert again.dtype_policy.name == "bfloat16"
    assert_same_weights(again, ours)


@leaves_a_file_open
def test_the_whole_task_in_both_directions(tiny_proto, tmp_path):
    import keras_hub

    ours = make_task(GEMMA2, tiny_proto)
    ours.save_to_preset(tmp_path / "ours")
    theirs = keras_hub.models.GemmaCausalLM.from_preset(str(tmp_path / "ours"))
    assert_close(outputs(ours.backbone), outputs(theirs.backbone))
    assert theirs.preprocessor.sequence_length == 24
    text = "To be, or not to be"
    np.testing.assert_array_equal(
        ours.preprocessor.tokenizer(text), theirs.preprocessor.tokenizer(text)
    )

    theirs.preprocessor.add_end_token = False
    theirs.save_to_preset(str(tmp_path / "theirs"))
    back = Task.from_preset(tmp_path / "theirs")
    assert_same_weights(back.backbone, ours.backbone)
    assert back.preprocessor.tokenizer.proto == tiny_proto
    assert back.preprocessor.sequence_length == 24
    assert back.preprocessor.add_end_token is False


@leaves_a_file_open
def test_the_files_have_keras_hubs_keys(tiny_proto, tmp_path):
    import keras_hub

    make_task(GEMMA2, tiny_proto).save_to_preset(tmp_path / "ours")
    theirs = keras_hub.models.GemmaCausalLM.from_preset(str(tmp_path / "ours"))
    theirs.save_to_preset(str(tmp_path / "theirs"))

    def keys(value):
        return {k: keys(v) for k, v in value.items()} if isinstance(value, dict) else None

    for path in (tmp_path / "theirs").glob("*.json"):
        ours = json.loads((tmp_path / "ours" / path.name).read_text())
        expected = json.loads(path.read_text())
        assert keys(ours) == keys(expected), path.name
        assert ours.get("registered_name") == expected.get("registered_name")
        assert ours.get("module") == expected.get("module")


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


def test_a_mixed_policy_comes_back(tmp_path):
    make_backbone(GEMMA1, dtype="mixed_bfloat16").save_to_preset(tmp_path)
    assert GemmaBackbone.from_preset(tmp_path).dtype_policy.name == "mixed_bfloat16"


def test_each_tensor_is_read_once_and_alone(tmp_path, monkeypatch):
    from keras_gemma.storage import checkpoint

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


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_proto):
    folder = tmp_path_factory.mktemp("saved") / "preset"
    make_task(GEMMA1, tiny_proto).save_to_preset(folder)
    return folder


@pytest.fixture
def preset(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "preset")


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
            "Quantized.*before it is quantised",
        ),
    ],
)
def test_configurations_that_cannot_be(change, message, preset):
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


def test_tensors_that_are_no_floats(preset):
    with h5py.File(preset / "model.weights.h5", "a") as file:
        group = file["layers/rms_normalization/vars"]
        del group["0"]
        group["0"] = np.zeros(32, "int8")
    with pytest.raises(ValueError, match=r"rms_normalization/vars/0 is int8"):
        GemmaBackbone.from_preset(preset)


def test_more_layers_than_the_weights_have(preset):
    with pytest.raises(ValueError, match=r"missing: layers/gemma_decoder_block_2/attention"):
        GemmaBackbone.from_preset(preset, num_layers=3)


def test_a_truncated_file(preset):
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
    with pytest.raises(ValueError, match=r"'\.\./secret\.weights\.h5', which does not lie"):
        GemmaBackbone.from_preset(tmp_path)
    index.write_text("{}")
    with pytest.raises(ValueError, match="lacks its `weight_map`"):
        GemmaBackbone.from_preset(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "preprocessor.json"])
def test_json_that_is_none(name, preset):
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


def test_shard_sizes():
    assert parse_size("10GB") == 10**10
    assert parse_size("1.5 kib") == 1536
    assert parse_size(1000) == 1000
    for size in ("ten", "0GB", 0, -1, "10", None, True):
        with pytest.raises(ValueError, match="max_shard_size="):
            parse_size(size)


def test_a_shard_smaller_than_a_tensor(tmp_path):
    with pytest.raises(ValueError, match=r"token_embedding: 65536 bytes.*Received: 10 bytes"):
        save(make_backbone(GEMMA1), tmp_path / "new", max_shard_size=10)
    assert not (tmp_path / "new").exists()


def test_an_interrupted_save_leaves_the_earlier_preset_whole(preset, monkeypatch):
    before = {p: p.read_bytes() for p in preset.rglob("*") if p.is_file()}
    other = make_backbone(GEMMA2)
    write, written = h5py.Group.create_dataset, []

    def failing(self, name, **kwargs):
        written.append(name)
        if len(written) > 5:
            raise OSError("No space left on device")
        return write(self, name, **kwargs)

    monkeypatch.setattr(h5py.Group, "create_dataset", failing)
    with pytest.raises(OSError, match="No space left"):
        other.save_to_preset(preset)
    assert {p: p.read_bytes() for p in preset.rglob("*") if p.is_file()} == before
    assert list(preset.parent.iterdir()) == [preset]


def test_a_save_replaces_weights_and_keeps_what_it_does_not_hold(preset):
    (preset / "README.md").write_text("mine")
    other = make_backbone(GEMMA2)
    save(other, preset, max_shard_size="70KB")
    names = {path.name for path in preset.iterdir()}
    assert not {"task.json", "model.weights.h5"} & names
    assert {"README.md", "tokenizer.json", "model.weights.json", "assets"} <= names
    assert_same_weights(Task.from_preset(preset).backbone, other)

    Task(other).save_to_preset(preset)
    names = {path.name for path in preset.iterdir()}
    assert not {"tokenizer.json", "preprocessor.json", "model.weights.json"} & names
    assert {"README.md", "task.json", "model.weights.h5"} <= names
    assert Task.from_preset(preset).preprocessor is None
    assert list(preset.parent.iterdir()) == [preset]


def test_folders_that_cannot_be_replaced(preset, monkeypatch):
    backbone = make_backbone(GEMMA1)
    with pytest.raises(ValueError, match=r"config\.json is a file"):
        backbone.save_to_preset(preset / "config.json")
    monkeypatch.chdir(preset)
    with pytest.raises(ValueError, match="is the current directory"):
        backbone.save_to_preset(".")


def test_every_weight_has_a_path_of_its_own():
    config = GemmaConfig(**GEMMA2)
    places = keras_layout.h5_places(config)
    assert list(places) == list(config.weight_shapes())
    assert len({place.name for place in places.values()}) == len(places)
