"""Damaged and malicious folders: one message that names the file."""

import json

import h5py
import numpy as np
import pytest

from keras_gemma.model.backbone import GemmaBackbone
from keras_gemma.storage import save
from keras_gemma.storage.tensor_streaming import StoredTensor, join_shards
from keras_gemma.text.preprocessor import GemmaCausalLMPreprocessor
from keras_gemma.text.tokenizer import GemmaTokenizer
from tests.configurations import GEMMA1, GEMMA2
from tests.storage.conftest import (
    Task,
    assert_same_weights,
    make_backbone,
    make_keras_hub_backbone,
    make_task,
    save_to_hugging_face,
)

INDICES = {"keras": "model.weights.json", "hugging_face": "model.safetensors.index.json"}


def save_as(task, format, folder, **arguments):
    (save if format == "keras" else save_to_hugging_face)(task, folder, **arguments)


@pytest.fixture
def checkpoint(tiny_proto, tmp_path):
    save_to_hugging_face(make_task(GEMMA1, tiny_proto), tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture(params=INDICES)
def sharded(request, tmp_path):
    """A folder with shards and its index, in each format."""
    folder = tmp_path / "sharded"
    save_as(Task(make_backbone(GEMMA2)), request.param, folder, max_shard_size="70KB")
    return folder, folder / INDICES[request.param]


def edit(path, *keys, **values):
    """Sets `values` in the object under `keys` in a JSON file; `...` removes a value."""
    content = json.loads(path.read_text())
    target = content
    for key in keys:
        target = target[key]
    target.update(values)
    for key in [key for key, value in values.items() if value is ...]:
        del target[key]
    path.write_text(json.dumps(content))


# Indices.


def test_index_cannot_name_links_out_of_folder(sharded, tmp_path):
    """Any name is refused, including names that no format uses."""
    folder, index = sharded
    shard = next(iter(json.loads(index.read_text())["weight_map"].values()))
    for name in ("w.dat", "w"):
        outside = tmp_path / "outside"
        (folder / shard).rename(outside)
        (folder / name).symlink_to(outside)
        index.write_text(index.read_text().replace(shard, name))
        with pytest.raises(ValueError, match=rf"{name} is a link to .*outside.* do not trust"):
            GemmaBackbone.from_preset(folder)
        (folder / name).unlink()
        outside.rename(folder / name)
        shard = name
    GemmaBackbone.from_preset(folder)


@pytest.mark.parametrize(
    "content",
    [
        *("null", "[5]", "5", "{}", "{", '{"weight_map": {}}', '{"weight_map": ["a"]}'),
        *(f'{{"weight_map": {{"x": {x}}}}}' for x in ("5", "[5]", "null", '{"a": 1}', '["a", 1]')),
        "[" * 100_000,
    ],
    ids=lambda content: content[:30],
)
def test_invalid_index(content, sharded):
    folder, index = sharded
    index.write_text(content)
    with pytest.raises(ValueError, match=rf"{index.name} is not a valid weights index: "):
        GemmaBackbone.from_preset(folder)


def test_index_contradicts_its_files(sharded):
    folder, index = sharded
    weight_map = json.loads(index.read_text())["weight_map"]
    files = sorted(set(weight_map.values()))
    (first, file), (second, _), *_ = weight_map.items()
    other = next(name for name in files if name != file)

    def message(**entries):
        edit(index, "weight_map", **entries)
        with pytest.raises(ValueError) as error:
            GemmaBackbone.from_preset(folder)
        index.write_text(json.dumps({"weight_map": weight_map}))
        assert str(index) in str(error.value)
        return str(error.value)

    first_name, second_name = first.strip("/"), second.strip("/")
    absent = message(**{"/layers/foo/vars": file, "/layers/bar/vars": file})
    assert "(2 problems)" in absent
    assert f"layers/foo/vars in {file}" in absent
    assert f"layers/bar/vars in {file}" in absent
    removed = message(**{first: ..., second: ...})
    assert "(2 problems)" in removed
    assert f"held, but not named: {first_name} in {file}" in removed
    assert f"held, but not named: {second_name} in" in removed
    wrong = message(**{first: other})
    assert f"named, but not held: {first_name} in {other}" in wrong
    assert f"held, but not named: {first_name} in {file}" in wrong
    GemmaBackbone.from_preset(folder)


def test_tensor_in_two_files(tmp_path):
    tensor = StoredTensor((1,), "float32", lambda: np.zeros(1))
    shards = {"a.h5": {"x/vars/0": tensor}, "b.h5": {"x/vars/0": tensor, "x/vars/1": tensor}}
    with pytest.raises(ValueError, match=r"\(1 problems\).*\n  held 2 times: x/vars/0$"):
        join_shards(shards, {"x/vars": ["a.h5", "b.h5"]}, tmp_path, lambda name: name[:-2])
    del shards["a.h5"]["x/vars/0"]
    shards["a.h5"]["x/vars/2"] = tensor
    joined = join_shards(shards, {"x/vars": ["a.h5", "b.h5"]}, tmp_path, lambda name: name[:-2])
    assert sorted(joined) == ["x/vars/0", "x/vars/1", "x/vars/2"]


def test_tensor_stored_twice(tmp_path):
    from safetensors.numpy import load_file, save_file

    save_to_hugging_face(Task(make_backbone(GEMMA2)), tmp_path, max_shard_size="70KB")
    *_, last = sorted(tmp_path.glob("*.safetensors"))
    save_file(load_file(last) | {"model.embed_tokens.weight": np.zeros((512, 32), "f4")}, last)
    with pytest.raises(ValueError, match=r"held 2 times: model\.embed_tokens\.weight"):
        GemmaBackbone.from_preset(tmp_path)


@pytest.mark.parametrize("change", [str, lambda entry: entry[1:], lambda entry: entry[1:-5]])
def test_index_entries_that_keras_accepts(change, tmp_path):
    """With and without a leading slash; path of a layer or of its variables."""
    theirs = make_keras_hub_backbone(GEMMA2)
    theirs.save_to_preset(tmp_path, max_shard_size=70_000 / 2**30)
    expected = GemmaBackbone.from_preset(tmp_path)
    index = tmp_path / "model.weights.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    assert all(entry.startswith("/layers/") and entry.endswith("/vars") for entry in weight_map)
    changed = {change(entry): file for entry, file in weight_map.items()}
    index.write_text(json.dumps({"weight_map": changed}))
    assert_same_weights(GemmaBackbone.from_preset(tmp_path), expected)


# Tensors.


@pytest.mark.parametrize("dtype", ["float32", "int8", "float16"])
def test_tensor_marked_bfloat16_of_other_dtype(dtype, preset):
    with h5py.File(preset / "model.weights.h5", "a") as file:
        group = file["layers/rms_normalization/vars"]
        del group["0"]
        group["0"] = np.zeros(32, dtype)
        group["0"].attrs["dtype"] = "bfloat16"
    with pytest.raises(ValueError, match=f"vars/0 is {dtype} marked bfloat16, expected a float"):
        GemmaBackbone.from_preset(preset)


def test_empty_tensor(preset):
    with h5py.File(preset / "model.weights.h5", "a") as file:
        group = file["layers/rms_normalization/vars"]
        del group["0"]
        group["0"] = h5py.Empty("float32")
    with pytest.raises(ValueError, match=r"rms_normalization/vars/0 is \(0,\), expected \(32,\)"):
        GemmaBackbone.from_preset(preset)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("format", INDICES)
def test_weights_beyond_float16(format, dtype, tmp_path):
    backbone = make_backbone(GEMMA1, dtype)
    weight = backbone.named_weights()["layers.1.up"]
    large = weight.numpy().astype("float32")
    large[3, 4] = -1e5
    weight.assign(large)
    save_as(Task(backbone), format, tmp_path / "model")
    name = {"keras": "gating_ffw_2/vars/0", "hugging_face": r"mlp\.up_proj\.weight"}[format]
    with pytest.raises(ValueError, match=rf"{name} holds numbers beyond float16.*bfloat16"):
        GemmaBackbone.from_preset(tmp_path / "model", dtype="float16")
    wide = GemmaBackbone.from_preset(tmp_path / "model", dtype="mixed_float16")
    assert_same_weights(wide, backbone)
    large[3, 4] = -65504.0
    weight.assign(large)
    if dtype == "float32":
        save_as(Task(backbone), format, tmp_path / "model", overwrite=True)
        narrow = GemmaBackbone.from_preset(tmp_path / "model", dtype="float16")
        assert narrow.named_weights()["layers.1.up"].numpy()[3, 4] == -65504.0


# Descriptions.


@pytest.mark.parametrize("settings", [{"num_layers": 10**6}, {"num_layers": 10**12}])
def test_too_many_layers(settings, preset):
    edit(preset / "config.json", "config", **settings)
    with pytest.raises(ValueError, match=r"config\.json asks for 1000+ layers, and at most 1000"):
        GemmaBackbone.from_preset(preset)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_hidden_layers": 10**12}, "asks for 1000000000000 layers, and at most 1000"),
        ({"rms_norm_eps": None}, "rms_norm_eps=None, not int or float"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps='x', not int or float"),
        ({"attn_logit_softcapping": "50"}, "attn_logit_softcapping='50', not int or float or None"),
        ({"final_logit_softcapping": [3]}, r"final_logit_softcapping=\[3\]"),
        ({"sliding_window": "4"}, "sliding_window='4', not int or None"),
        ({"max_position_embeddings": True}, "max_position_embeddings=True, not int"),
        ({"model_type": ["gemma2"]}, r"has model_type \['gemma2'\]"),
        ({"model_type": {}}, r"has model_type \{\}"),
        ({"head_dim": "8"}, "not positive integers: head_dim='8'"),
        ({"layer_types": 5}, "layer_types=5, not list or None"),
    ],
)
def test_wrong_types_in_checkpoint(settings, message, tmp_path):
    save_to_hugging_face(Task(make_backbone(GEMMA2)), tmp_path)
    edit(tmp_path / "config.json", **settings)
    with pytest.raises(ValueError, match=rf"config\.json .*{message}") as error:
        GemmaBackbone.from_preset(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("tokenizer.json", {"sequence_length": "5"}, "sequence_length='5', not int or None"),
        ("tokenizer.json", {"add_bos": 1}, "add_bos=1, not bool"),
        ("tokenizer.json", {"dtype": "nonsense"}, "dtype policy 'nonsense'"),
        ("preprocessor.json", {"add_start_token": "no"}, "add_start_token='no', not bool"),
        ("preprocessor.json", {"sequence_length": 3.5}, "sequence_length=3.5, not int"),
        ("config.json", {"trainable": "no", "name": 3}, "name=3, not str; trainable='no', not"),
        ("config.json", {"use_post_ffw_norm": "no"}, "use_post_ffw_norm='no', not bool"),
        ("config.json", {"dropout": "no"}, "dropout='no', not int or float"),
        ("config.json", {"num_layers": "2"}, "num_layers='2', not int"),
        ("config.json", {"attention_logit_soft_cap": "5"}, "attention_logit_soft_cap='5'"),
        ("config.json", {"dtype": "int8_from_float32"}, "policy 'int8_from_float32'.*quantized"),
        ("config.json", {"dtype": "int32"}, "dtype policy 'int32'.*only plain floating-point"),
        ("config.json", {"dtype": ["float32"]}, r"dtype policy \['float32'\]"),
        ("config.json", {"dtype": {"class_name": "DTypePolicy", "config": None}}, "dtype policy"),
        (
            "config.json",
            {"dtype": {"class_name": "DTypePolicy", "config": {"name": "int8_from_float32"}}},
            "dtype policy .*int8_from_float32.*quantized",
        ),
    ],
)
def test_wrong_types_in_preset(name, settings, message, preset):
    edit(preset / name, "config", **settings)
    with pytest.raises(ValueError, match=message) as error:
        Task.from_preset(preset)
    assert str(preset / name) in str(error.value)


def test_context_length_of_wrong_type(preset):
    edit(preset / "metadata.json", context_length="48")
    with pytest.raises(ValueError, match=r"metadata\.json .*context_length='48', not int"):
        GemmaBackbone.from_preset(preset)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "preprocessor.json"])
def test_deeply_nested_json(name, preset):
    (preset / name).write_text('{"a":' * 100_000)
    with pytest.raises(ValueError, match=rf"{name} is not valid JSON: maximum recursion"):
        Task.from_preset(preset)


# Folders that lack a part.


def test_folder_without_model(preset, tmp_path):
    folder = tmp_path / "tokenizer"
    GemmaTokenizer.from_preset(preset).save_to_preset(folder)
    for cls in (GemmaBackbone, Task):
        with pytest.raises(
            ValueError,
            match=r"tokenizer has no model: it lacks config\.json\. It holds "
            r"assets/, tokenizer\.json\. Save a whole model there with `lm\.save_to_preset",
        ):
            cls.from_preset(folder)
    GemmaCausalLMPreprocessor.from_preset(folder)


def test_checkpoint_without_config(checkpoint):
    (checkpoint / "config.json").unlink()
    with pytest.raises(ValueError, match=r"it lacks config\.json.*model\.safetensors"):
        GemmaBackbone.from_preset(checkpoint)


def test_config_json_is_a_folder(preset, tmp_path):
    (preset / "config.json").unlink()
    (preset / "config.json").mkdir()
    with pytest.raises(ValueError, match=r"lacks config\.json\. It holds assets/, config\.json/"):
        GemmaBackbone.from_preset(preset)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"is not a preset.*It holds nothing\. Pass a folder"):
        GemmaBackbone.from_preset(tmp_path / "empty")
    for number in range(12):
        (tmp_path / "empty" / f"{number:02}.txt").touch()
    with pytest.raises(ValueError, match=r"It holds 00\.txt, .*, 07\.txt and 4 more\."):
        GemmaBackbone.from_preset(tmp_path / "empty")


# Names.


def test_empty_name(preset, monkeypatch):
    monkeypatch.chdir(preset)
    for name in ("", "  "):
        with pytest.raises(ValueError, match=r"`preset` must not be empty.*'\.' for the current"):
            GemmaBackbone.from_preset(name)
    GemmaBackbone.from_preset(".")


def test_folder_with_name_of_built_in_preset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    backbone = make_backbone(GEMMA1)
    backbone.save_to_preset("gemma_tiny_en")
    with pytest.warns(UserWarning, match=r"pass '\./gemma_tiny_en'") as warned:
        built_in = GemmaBackbone.from_preset("gemma_tiny_en")
    assert warned[0].filename == __file__
    assert built_in.config != backbone.config
    assert_same_weights(GemmaBackbone.from_preset("./gemma_tiny_en"), backbone)
