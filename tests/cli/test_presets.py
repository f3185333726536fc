"""`keras-gemma presets`: table and JSON."""

import json
import re
import sys

import pytest

from keras_gemma import catalogue
from keras_gemma.cli import main
from tests.storage.hubs import lay_out_hugging_face, lay_out_kaggle

DTYPES = ("float32", "bfloat16", "int8", "int4")


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """Caches of both hubs with one model each, and colors requested."""
    tiny = catalogue.presets()["gemma_tiny_en"].folder
    lay_out_kaggle(tmp_path / "kagglehub", "keras/gemma/keras/gemma_2b_en/3", tiny)
    lay_out_hugging_face(tmp_path / "hub", "google/gemma-2-27b-it", tiny)
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "kagglehub"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("FORCE_COLOR", "1")


def test_table_in_a_pipe(caches, capsys):
    """All columns without colors."""
    assert main(["presets"]) == 0
    table = capsys.readouterr().out
    assert table.isascii() and "\x1b" not in table
    head, *lines = table.splitlines()
    assert head.split() == ["preset", "parameters", "context", *DTYPES, "weights", "license"]
    rows = {line.split()[0]: line for line in lines}
    assert list(rows) == list(catalogue.presets())
    cells = re.split(r"\s{2,}", rows["gemma2_2b_en"].strip())
    memory = ["10.46 GB", "5.23 GB", "2.62 GB", "1.73 GB"]
    assert cells == ["gemma2_2b_en", "2,614.3 M", "8,192", *memory, "to download", "gemma"]
    for name in ("gemma_tiny_en", "gemma_tiny_instruct_en"):
        assert rows[name].split()[-3:] == ["built", "in", "Apache-2.0"]
    cached = [name for name, line in rows.items() if " cached " in line]
    assert cached == ["gemma_2b_en", "gemma2_instruct_27b_en"]


ALL = ["preset", "parameters", "context", *DTYPES, "weights", "license"]


@pytest.mark.parametrize(
    ("width", "columns"),
    [
        (160, ALL),
        (120, ALL[:-1]),
        (110, [name for name in ALL[:-1] if name != "float32"]),
        (92, [name for name in ALL[:-1] if name not in ("float32", "int8")]),
        (80, ["preset", "parameters", "context", "bfloat16", "weights"]),
        (32, ["preset"]),
    ],
)
def test_narrow_terminal_has_fewer_columns(width, columns, terminal, monkeypatch):
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    assert main(["presets"]) == 0
    lines = re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue()).splitlines()
    assert max(map(len, lines)) <= width
    lines = [line for line in lines if line.strip()]
    assert lines[0].split() == columns
    assert [line.split()[0] for line in lines[2:]] == list(catalogue.presets())
    assert "\N{HORIZONTAL ELLIPSIS}" not in "".join(lines)


def test_json(caches, capsys):
    assert main(["presets", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    entries = {entry["name"]: entry for entry in map(json.loads, lines)}
    assert list(entries) == list(catalogue.presets())
    assert entries["gemma_2b_en"]["weights"] == "cached"
    assert entries["gemma_7b_en"]["weights"] == "to download"
    assert entries["gemma2_9b_en"]["memory"] == {
        "float32": 36_966_823_936,
        "bfloat16": 18_483_411_968,
        "int8": 9_250_733_056,
        "int4": 5_601_762_304,
    }
    assert entries["gemma_tiny_en"]["context_length"] == 256
