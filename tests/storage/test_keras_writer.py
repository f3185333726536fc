"""KerasHub's folder, written: KerasHub reads it, and a failed save breaks nothing."""

import json
import subprocess
import sys
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest

from keras_gemma.config import GemmaConfig
from keras_gemma.model.backbone import GemmaBackbone
from keras_gemma.storage import save
from keras_gemma.storage.keras_preset import layout as keras_layout
from keras_gemma.storage.keras_preset import writer as keras_writer
from keras_gemma.storage.sharding import parse_size
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
from tests.storage.keras_hub_weights import (
    KERAS_HUB_IS_WRONG,
    assert_same_as_keras_hub,
    leaves_a_file_open,
)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_keras_hub_reads_what_we_write(name, tmp_path):
    import keras_hub

    ours = make_backbone(CONFIGURATIONS[name])
    ours.save_to_preset(tmp_path / "preset")
    theirs = keras_hub.models.Backbone.from_preset(str(tmp_path / "preset"))
    assert type(theirs).__name__ == f"{ours.config.family}Backbone"
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

    save(ours, tmp_path / "ours", max_shard_size=size / 2**30)
    files = sorted(path.name for path in (tmp_path / "ours").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert ("model_00001.weights.h5" in files) == sharded
    back = keras_hub.models.GemmaBackbone.from_preset(str(tmp_path / "ours"))
    assert_same_as_keras_hub(ours, back)
    again = GemmaBackbone.from_preset(tmp_path / "ours")
    assert again.dtype_policy.name == "bfloat16"
    assert_same_weights(again, ours)


@leaves_a_file_open
def test_task_round_trip_with_keras_hub(tiny_proto, tmp_path):
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
def test_files_have_the_keys_of_keras_hub(tiny_proto, tmp_path):
    import keras_hub

    make_task(GEMMA2, tiny_proto).save_to_preset(tmp_path / "ours")
    theirs = keras_hub.models.GemmaCausalLM.from_preset(str(tmp_path / "ours"))
    theirs.save_to_preset(str(tmp_path / "theirs"))

    def keys(value):
        return {k: keys(v) for k, v in value.items()} if isinstance(value, dict) else None

    for path in (tmp_path / "theirs").glob("*.json"):
        ours = json.loads((tmp_path / "ours" / path.name).read_text())
        expected = json.loads(path.read_text())
        if path.name == "metadata.json":
            assert ours.pop("context_length") == 8192  # which KerasHub does not know
        assert keys(ours) == keys(expected), path.name
        assert ours.get("registered_name") == expected.get("registered_name")
        assert ours.get("module") == expected.get("module")


def test_context_length_is_in_metadata(tmp_path):
    import keras_hub

    ours = make_backbone(GEMMA1 | {"context_length": 48})
    ours.save_to_preset(tmp_path)
    assert "context_length" not in json.loads((tmp_path / "config.json").read_text())["config"]
    assert json.loads((tmp_path / "metadata.json").read_text())["context_length"] == 48
    assert GemmaBackbone.from_preset(tmp_path).context_length == 48
    assert GemmaBackbone.from_preset(tmp_path, context_length=24).context_length == 24
    assert_same_as_keras_hub(ours, keras_hub.models.GemmaBackbone.from_preset(str(tmp_path)))
    (tmp_path / "metadata.json").unlink()
    assert GemmaBackbone.from_preset(tmp_path).context_length == 8192


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16", "bfloat16"])
def test_policies_are_written_as_keras_writes_them(dtype, tiny_proto):
    item = make_task(GEMMA1, tiny_proto, dtype)
    for layer, content in (
        (item.backbone, keras_writer.backbone_object(item.backbone)),
        (item.preprocessor, keras_writer.preprocessor_object(item.preprocessor, "Gemma")),
    ):
        assert content["config"]["dtype"] == keras.dtype_policies.serialize(layer.dtype_policy)


@pytest.mark.once
@pytest.mark.skipif(keras.config.backend() == "tensorflow", reason="it is imported anyway")
def test_loading_and_saving_import_no_tensorflow(tmp_path, command_environment):
    code = (
        "import sys, keras_gemma;"
        "lm = keras_gemma.GemmaCausalLM.from_preset('gemma_tiny_en');"
        "lm.save_to_preset(sys.argv[1] + '/ours');"
        "lm.save_to_hugging_face(sys.argv[1] + '/theirs');"
        "print('tensorflow' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=command_environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert result.stdout == "False\n", result.stderr


def test_shard_sizes():
    assert parse_size("10GB") == 10**10
    assert parse_size("1.5 kib") == 1536
    assert parse_size(1000) == 1000
    for size in ("ten", "0GB", 0, -1, "10", None, True):
        with pytest.raises(ValueError, match="max_shard_size="):
            parse_size(size)


def test_shard_smaller_than_tensor(tmp_path):
    with pytest.raises(ValueError, match=r"token_embedding: 65536 bytes.*Received: 10 bytes"):
        save(make_backbone(GEMMA1), tmp_path / "new", max_shard_size="10B")
    assert not (tmp_path / "new").exists()


def test_interrupted_save_keeps_earlier_preset(preset, monkeypatch):
    before = {p: p.read_bytes() for p in preset.rglob("*") if p.is_file()}
    other = make_backbone(GEMMA2)
    write, written = h5py.Group.create_dataset, []

    def failing(self, name, **kwargs):
        written.append(name)
        if len(written) > 5:
            raise OSError("No space left on device")
        return write(self, name, **kwargs)

    monkeypatch.setattr(h5py.Group, "create_dataset", failing)
    with pytest.raises(
        OSError, match=r"No space is left on the disk of `preset_dir`.*was replaced"
    ):
        other.save_to_preset(preset, overwrite=True)
    assert {p: p.read_bytes() for p in preset.rglob("*") if p.is_file()} == before
    assert list(preset.parent.iterdir()) == [preset]


def test_save_replaces_weights_and_keeps_other_files(preset):
    (preset / "README.md").write_text("mine")
    other = make_backbone(GEMMA2)
    save(other, preset, max_shard_size="70KB", overwrite=True)
    names = {path.name for path in preset.iterdir()}
    assert not {"task.json", "model.weights.h5"} & names
    assert {"README.md", "tokenizer.json", "model.weights.json", "assets"} <= names
    assert_same_weights(Task.from_preset(preset).backbone, other)

    Task(other).save_to_preset(preset, overwrite=True)
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


def test_paths_of_weights_are_unique():
    config = GemmaConfig(**GEMMA2)
    places = keras_layout.h5_specs(config)
    assert list(places) == list(config.weight_shapes())
    assert len({place.name for place in places.values()}) == len(places)
