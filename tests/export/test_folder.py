"""Folder, arguments and serving options of an export."""

import errno
import shutil

import pytest

from keras_gemma import export, samplers
from keras_gemma.export import subprocess_export
from keras_gemma.export.serving_options import ServingOptions, options_of
from tests.models import make_lm


@pytest.fixture(scope="module")
def lm(tiny_proto):
    return make_lm(proto=tiny_proto)


@pytest.fixture
def quick_format(monkeypatch):
    """A fast format `quick`, which writes the option `text` to a file."""

    def write(lm, directory, *, text="whole"):
        (directory / "model").write_text(text[:3])
        if text == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        (directory / "model").write_text(text)

    monkeypatch.setitem(export.FORMATS, "quick", write)


def test_existing_path_needs_overwrite(lm, quick_format, tmp_path):
    lm.export(tmp_path / "a", "quick")
    with pytest.raises(ValueError, match="overwrite=True"):
        lm.export(tmp_path / "a", "quick", text="new")
    assert (tmp_path / "a" / "model").read_text() == "whole"
    lm.export(tmp_path / "a", "quick", overwrite=True, text="new")
    assert (tmp_path / "a" / "model").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_full_disk_keeps_earlier_export(lm, quick_format, tmp_path):
    lm.export(tmp_path / "a", "quick")
    with pytest.raises(OSError, match="No space"):
        lm.export(tmp_path / "a", "quick", overwrite=True, text="full")
    assert (tmp_path / "a" / "model").read_text() == "whole"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_disk_space_is_checked_first(lm, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(subprocess_export.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="MB are free"):
        lm.export(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_other_folders_are_never_replaced(lm, quick_format, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.txt").write_text("text")
    with pytest.raises(ValueError, match="replaces only exports"):
        lm.export(tmp_path / "a", "quick", overwrite=True)
    assert (tmp_path / "a" / "thesis.txt").read_text() == "text"


def test_invalid_arguments(lm, quick_format, tmp_path):
    with pytest.raises(ValueError, match="tf_saved_model"):
        lm.export(tmp_path / "a", "zip")
    with pytest.raises(TypeError, match=r"no argument `max_tokens`\. Did you mean `max_new_to"):
        lm.export(tmp_path / "a", max_tokens=3)
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        lm.export(tmp_path / "a", max_new_tokens=0)
    with pytest.raises(ValueError, match="preprocessor"):
        make_lm().export(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_defaults_are_taken_from_compile(tiny_proto):
    lm = make_lm(proto=tiny_proto)
    stops = tuple(lm.preprocessor.tokenizer.stop_token_ids)
    assert options_of(lm, None, None) == ServingOptions(stop_token_ids=stops)
    lm.compile(sampler=samplers.TopKSampler(k=3, seed=2**32 - 2), max_new_tokens=9, stop="x")
    assert options_of(lm, None, 4) == ServingOptions(
        9, 1.0, 3, seed=-2, stop=("x",), stop_token_ids=stops, max_batch_size=4
    )
    lm.compile(temperature=0.5, stop_token_ids=[5])
    assert options_of(lm, 7, None) == ServingOptions(7, 0.5, stop_token_ids=(5,))


@pytest.mark.parametrize(
    "compiled",
    [
        {"sampler": "beam"},
        {"repetition_penalty": 2.0},
        {"presence_penalty": 2.0},
        {"temperature": [0.5, 1.0]},
    ],
)
def test_unsupported_settings_are_refused(tiny_proto, compiled):
    lm = make_lm(proto=tiny_proto)
    lm.compile(**compiled)
    with pytest.raises(ValueError, match="served model"):
        options_of(lm, None, None)
