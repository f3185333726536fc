"""Replacement of folders: permissions, files of other formats, invalid paths."""

import errno
import json
import os
import stat

import numpy as np
import pytest

from keras_gemma import GemmaCausalLM
from keras_gemma.model.backbone import GemmaBackbone
from keras_gemma.storage import save
from keras_gemma.storage.files import check_writable, replacing
from keras_gemma.storage.gguf.writer import save_to_gguf
from keras_gemma.storage.sharding import parse_size
from keras_gemma.text.tokenizer import GemmaTokenizer
from tests.configurations import GEMMA1
from tests.storage.conftest import Task, assert_same_weights, make_task, save_to_hugging_face

KERAS = {
    *("assets", "config.json", "metadata.json", "model.weights.h5"),
    *("preprocessor.json", "task.json", "tokenizer.json"),
}
HUGGING_FACE = {
    *("config.json", "generation_config.json", "model.safetensors", "special_tokens_map.json"),
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
}


@pytest.fixture
def task(tiny_proto):
    return make_task(GEMMA1, tiny_proto)


def names(folder):
    return {path.name for path in folder.iterdir()}


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


# Permissions.


@pytest.mark.parametrize("writer", [save, save_to_hugging_face])
def test_folder_keeps_permissions(writer, task, tmp_path):
    folder = tmp_path / "model"
    writer(task, folder)
    usual = mode(folder)
    weights = next(path for path in folder.iterdir() if path.name.startswith("model."))
    (folder / "mine").mkdir()
    (folder / "mine" / "notes").touch()
    modes = {folder: 0o700, weights: 0o600, folder / "mine": 0o750, folder / "mine/notes": 0o640}
    for path, value in modes.items():
        path.chmod(value)
    writer(task, folder, overwrite=True)
    assert {path: mode(path) for path in modes} == modes
    writer(task, tmp_path / "other")
    assert mode(tmp_path / "other") == usual


def test_file_keeps_permissions(task, tmp_path):
    pytest.importorskip("gguf", reason="the package gguf writes these files")
    path = tmp_path / "tiny.gguf"
    save_to_gguf(task, path)
    usual = mode(path)
    assert usual != 0o600
    path.chmod(0o600)
    save_to_gguf(task, path, overwrite=True)
    assert mode(path) == 0o600


def test_links_and_empty_folders_stay(task, tmp_path):
    folder = tmp_path / "model"
    save(task, folder)
    (folder / "empty").mkdir(parents=True)
    (folder / "broken").symlink_to("nowhere")
    (folder / "config.json").rename(tmp_path / "outside")
    (tmp_path / "outside").chmod(0o600)
    (folder / "config.json").symlink_to(tmp_path / "outside")
    save(task, folder, overwrite=True)
    assert KERAS | {"empty", "broken"} == names(folder)
    assert not (folder / "config.json").is_symlink()
    assert mode(tmp_path / "outside") == 0o600


# One format in the place of the other.


def test_whole_model_replaces_other_format(task, tmp_path):
    folder = tmp_path / "model"
    save_to_hugging_face(task, folder)
    assert names(folder) == HUGGING_FACE
    (folder / "README.md").write_text("mine")
    (folder / "model_backup").mkdir()
    (folder / "model_backup" / "a.weights.h5").touch()
    mine = {"README.md", "model_backup"}
    save(task, folder, overwrite=True)
    assert names(folder) == KERAS | mine
    assert_same_weights(Task.from_preset(folder).backbone, task.backbone)
    save_to_hugging_face(task, folder, overwrite=True)
    assert names(folder) == HUGGING_FACE | mine
    assert_same_weights(Task.from_preset(folder).backbone, task.backbone)
    save(task.backbone, tmp_path / "part")
    (tmp_path / "part" / "model_backup").mkdir()
    (tmp_path / "part" / "model_backup" / "a.weights.h5").touch()
    save(task.backbone, tmp_path / "part", overwrite=True)
    assert (tmp_path / "part" / "model_backup" / "a.weights.h5").exists()
    save(Task(task.backbone), folder, max_shard_size="70KB", overwrite=True)
    assert not names(folder) & (HUGGING_FACE - {"config.json"})
    save_to_hugging_face(Task(task.backbone), folder, overwrite=True)
    assert names(folder) == {"config.json", "model.safetensors"} | mine


@pytest.mark.parametrize("part", ["tokenizer", "preprocessor", "backbone"])
def test_part_does_not_mix_with_other_format(part, task, tmp_path):
    folder = tmp_path / "model"
    save_to_hugging_face(task, folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    item = task.preprocessor.tokenizer if part == "tokenizer" else getattr(task, part)
    with pytest.raises(ValueError, match=r"holds a Hugging Face checkpoint.*a whole model: `lm\."):
        save(item, folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    for name in HUGGING_FACE - {"config.json"}:
        (folder / name).unlink()
    with pytest.raises(ValueError, match=r"which holds config\.json"):
        save(item, folder)
    (folder / "config.json").unlink()
    save(item, folder)
    save(item, folder, overwrite=True)


# Places that are none.


@pytest.mark.parametrize(
    ("place", "error", "message"),
    [
        ("hf://me/x", ValueError, r"a path on this machine.*upload_preset.*'hf://me/x'"),
        ("kaggle://me/a/keras/b", ValueError, "keras_gemma.upload_preset"),
        (os.path, TypeError, "must be a string or a path"),
        (5, TypeError, "=5"),
        (None, TypeError, "=None"),
        ("", ValueError, "must not be empty"),
    ],
)
def test_invalid_paths(place, error, message, task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for writer, argument in (
        (save, "preset_dir"),
        (save_to_hugging_face, "directory"),
        (save_to_gguf, "path"),
    ):
        with pytest.raises(error, match=rf"`{argument}` .*{message}"):
            writer(task, place)
    assert list(tmp_path.iterdir()) == []


def test_unwritable_paths(task, tmp_path):
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "model"
    for writer, argument, target in (
        (save, "preset_dir", place),
        (save_to_hugging_face, "directory", place),
        (save_to_gguf, "path", place / "tiny.gguf"),
    ):
        with pytest.raises(ValueError, match=rf"`{argument}` cannot be written: .*{target}'"):
            writer(task, target)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_check_writable_creates_nothing(tmp_path):
    (tmp_path / "file").touch()
    check_writable(tmp_path / "new" / "model", "target")
    with pytest.raises(ValueError, match="`target` cannot be written: Not a directory"):
        check_writable(tmp_path / "file" / "new" / "model", "target")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_failed_block_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), replacing(tmp_path / "new", lambda name: False) as folder:
        (folder / "x").touch()
        raise KeyError
    assert list(tmp_path.iterdir()) == []


# Sizes of files.


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        *(("1TB", 10**12), ("2tib", 2**41), (".5KB", 500), (" 3 B ", 3), ("1.5GiB", 3 * 2**29)),
        *((np.int64(7), 7), (np.float32(1e6), 10**6), (2.9, 2)),
    ],
)
def test_sizes(size, expected):
    assert parse_size(size) == expected
    assert type(parse_size(size)) is int


@pytest.mark.parametrize(
    "size",
    [
        *("1.2.3GB", ".GB", "1iB", "1XB", "-1GB", "9" * 400 + "GB", "0.1B", ""),
        *(float("inf"), float("nan"), -1, 0.5, np.int64(0), np.bool_(True), [1], None),
    ],
)
def test_invalid_sizes(size):
    with pytest.raises(ValueError, match="max_shard_size` must be a number of bytes, or a string"):
        parse_size(size)


# What the numbers are.


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype float64")
def test_float64_round_trip(task, tmp_path):
    """JAX stores it in float32 by default."""
    save(task, tmp_path / "keras")
    wide = GemmaBackbone.from_preset(tmp_path / "keras", dtype="float64")
    save_to_hugging_face(Task(wide), tmp_path / "model")
    held = str(wide.named_weights()["final_norm"].numpy().dtype)
    assert held in ("float32", "float64")
    from safetensors.numpy import load_file

    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert {str(array.dtype) for array in stored.values()} == {held}
    assert f'"torch_dtype": "{held}"' in (tmp_path / "model" / "config.json").read_text()
    assert_same_weights(GemmaBackbone.from_preset(tmp_path / "model"), task.backbone)


def test_gguf_refuses_non_finite_weights(task, tmp_path):
    pytest.importorskip("gguf", reason="the package gguf writes these files")
    weight = task.backbone.named_weights()["layers.0.gate"]
    original = weight.numpy().copy()

    def refused(value, dtype, message):
        array = original.copy()
        array[2, 3] = value
        weight.assign(array)
        with pytest.raises(ValueError, match=message):
            save_to_gguf(task, tmp_path / "tiny.gguf", dtype)
        assert list(tmp_path.iterdir()) == []

    for dtype in ("bf16", "f16", "q8_0", "q4_0"):
        refused(np.nan, dtype, r"layers\.0\.gate holds nan, so the model is unusable")
        refused(-np.inf, dtype, r"layers\.0\.gate holds inf")
    refused(1e5, "f16", r"layers\.0\.gate holds 100000\.0, which exceeds float16")
    refused(1e7, "q8_0", "exceeds float16")
    refused(-1e6, "q4_0", "exceeds float16")
    weight.assign(original)
    norm = task.backbone.named_weights()["final_norm"]
    norm.assign(np.full(norm.shape, np.nan, "float32"))
    with pytest.raises(ValueError, match="final_norm holds nan"):
        save_to_gguf(task, tmp_path / "tiny.gguf")


def test_arguments_of_gguf(task, tmp_path):
    for dtype in (["q5"], {}, None):
        with pytest.raises(ValueError, match="`dtype` must be one of 'bf16'"):
            save_to_gguf(task, tmp_path / "x.gguf", dtype)
    with pytest.raises(ValueError, match=r"Name one such as '.*/x\.gguf'"):
        save_to_gguf(task, tmp_path / "x.bin")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"Name one such as '.*/folder/gemma\.gguf'"):
        save_to_gguf(task, tmp_path / "folder")


def test_tokenizer_is_saved_next_to_other_files(task, tmp_path):
    save(task.backbone, tmp_path / "model")
    (tmp_path / "model" / "notes.txt").write_text("mine")
    (tmp_path / "model" / "tokenizer.json").write_text("{")
    save(task.preprocessor.tokenizer, tmp_path / "model", overwrite=True)
    GemmaTokenizer.from_preset(tmp_path / "model")
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine"


# Targets that exist.


WRITERS = {
    "preset": (lambda lm, path, **how: lm.save_to_preset(path, **how), "model"),
    "hugging_face": (lambda lm, path, **how: lm.save_to_hugging_face(path, **how), "model"),
    "orbax": (lambda lm, path, **how: lm.save_to_orbax(path, **how), "model"),
    "gguf": (lambda lm, path, **how: lm.save_to_gguf(path, **how), "model.gguf"),
    "lora": (lambda lm, path, **how: lm.save_lora(path, **how), "adapter"),
    "h5": (lambda lm, path, **how: lm.backbone.save_lora_weights(path, **how), "x.lora.h5"),
}


def contents(path):
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}


@pytest.fixture(scope="module")
def adapted():
    lm = GemmaCausalLM.from_preset("gemma_tiny_en")
    lm.enable_lora(rank=2)
    return lm


@pytest.mark.once
@pytest.mark.parametrize("name", WRITERS)
def test_existing_targets(name, adapted, tmp_path):
    """A result is replaced on request only, and anything else never."""
    write, place = WRITERS[name]
    target = tmp_path / place
    if "." not in place:
        target.mkdir()  # an empty folder holds nothing to lose
    write(adapted, target)
    before = contents(target)
    with pytest.raises(ValueError, match=r"exists: choose another path, or pass overwrite=True"):
        write(adapted, target)
    assert contents(target) == before
    write(adapted, target, overwrite=True)
    assert contents(target) != before

    other = tmp_path / f"other_{place}"
    if "." in place:
        other.write_text("mine")
    else:
        other.mkdir()
        (other / "config.json").write_text('{"mine": 1}')
    before = contents(other)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="exists, and `overwrite=True` replaces only"):
            write(adapted, other, overwrite=overwrite)
    assert contents(other) == before


@pytest.mark.once
def test_parts_complete_a_preset(task, tmp_path):
    """KerasHub saves a tokenizer and a backbone to one folder."""
    save(task.preprocessor, tmp_path / "model")
    save(task.backbone, tmp_path / "model")
    for part in (task.preprocessor, task.preprocessor.tokenizer, task.backbone, task):
        with pytest.raises(ValueError, match="pass overwrite=True"):
            save(part, tmp_path / "model")
    assert_same_weights(Task.from_preset(tmp_path / "model").backbone, task.backbone)


@pytest.mark.once
def test_models_of_other_families_are_not_replaced(task, tmp_path):
    for config in ({"model_type": "llama"}, {"class_name": "BertBackbone", "config": {}}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="replaces only folders of Gemma models"):
            save(task, tmp_path, overwrite=True)
        assert json.loads((tmp_path / "config.json").read_text()) == config


# A disk without space.


@pytest.mark.once
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        RuntimeError(
            "Disable slist on flush dest failure failed (errno = 28, error message = "
            "'No space left on device', buf = 0x562e196c4708)"
        ),
    ],
)
def test_full_disk(error, tmp_path):
    with (
        pytest.raises(OSError, match=r"No space is left on the disk of `preset_dir`.*Free") as full,
        replacing(tmp_path / "new", lambda name: False),
    ):
        raise error
    assert full.value.errno == errno.ENOSPC and "0x" not in str(full.value)
    assert list(tmp_path.iterdir()) == []
