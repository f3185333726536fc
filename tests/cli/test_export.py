"""`keras-gemma export` of the built-in model, with test doubles of the formats."""

import keras
import pytest

from keras_gemma import export, extras
from keras_gemma.causal_lm.model import GemmaCausalLM
from keras_gemma.cli import main


@pytest.fixture
def seen(monkeypatch):
    """Backbone and options of each call of a format."""
    calls = []

    def write(lm, directory, **options):
        (directory / "model").write_text("made")
        calls.append((lm.backbone, options))

    for name in export.FORMATS:
        monkeypatch.setitem(export.FORMATS, name, write)
        monkeypatch.setitem(extras.EXPORTS, name, (name, ()))
    return calls


def test_saved_model(tmp_path, seen, capsys):
    target = tmp_path / "served"
    command = ["export", "gemma_tiny_en", str(target)]
    options = ["--max-new-tokens", "40", "--max-batch-size", "8", "--quantization", "int8"]
    assert main([*command, *options, "--dtype", "float32"]) == 0
    ((backbone, settings),) = seen
    assert settings == {"max_new_tokens": 40, "max_batch_size": 8}
    assert backbone.quantization.mode == "int8"
    assert keras.backend.standardize_dtype(backbone.compute_dtype) == "float32"
    assert "as tf_saved_model: 2 files" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"The target exists: .*pass --overwrite to replace it"):
        main(command)
    assert main([*command, "--overwrite"]) == 0
    assert seen[1][1] == {}


@pytest.mark.parametrize(("rows", "batch_size"), [("4", 4), ("0", None)])
def test_programs(rows, batch_size, tmp_path, seen):
    main(["export", "gemma_tiny_en", str(tmp_path / "a"), "--format", "jax", "--batch-size", rows])
    assert seen[0][1] == {"batch_size": batch_size}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "zip"], "tf_saved_model"),
        (["--format", "onnx", "--quantization", "int8"], "floating point"),
        (["--format", "torch", "--max-new-tokens", "4"], "torch does not have this option"),
        (["--format", "jax", "--max-batch-size", "4"], "jax does not have this option"),
        (["--batch-size", "4"], "tf_saved_model does not have this option"),
        (["--max-new-tokens", "0"], "--max-new-tokens"),
    ],
)
def test_wrong_usage(options, message, capsys):
    assert main(["export", "x", "y", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 2


def test_target_is_checked_before_the_model_is_read(tmp_path, monkeypatch):
    def read(*args, **kwargs):
        raise AssertionError("The model was read.")

    monkeypatch.setattr(GemmaCausalLM, "from_preset", read)
    monkeypatch.setitem(extras.EXPORTS, "tf_saved_model", ("tensorflow", ()))
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("")
    for place, message in (
        ("file/model", "`target` cannot be written: .*Pass a writable path"),
        ("file", "The target must be a folder"),
        ("folder", "The target exists, and --overwrite replaces only exports"),
    ):
        with pytest.raises(ValueError, match=message):
            main(["export", "gemma_tiny_en", str(tmp_path / place)])


@pytest.mark.once
@pytest.mark.parametrize(
    ("format", "missing", "extra"),
    [
        ("tf_saved_model", "tensorflow and tensorflow_text", "tensorflow"),
        ("jax", "flatbuffers", "jax"),
        ("onnx", "torch and onnx and onnxscript", "onnx"),
    ],
)
def test_missing_packages(format, missing, extra, monkeypatch, tmp_path):
    """The message names the format, not a backend that the user did not choose."""
    packages = missing.split(" and ")
    monkeypatch.setattr(extras, "is_installed", lambda name: name not in packages)
    words = rf'format={format!r} needs {missing}, not .*`pip install "\.\[{extra}\]"`'
    with pytest.raises(ImportError, match=words):
        main(["export", "gemma_tiny_en", str(tmp_path / "x"), "--format", format])
