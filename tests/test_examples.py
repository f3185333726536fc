"""Every example in the README and in a docstring runs as it stands."""

import ast
import json
import re
from pathlib import Path

import keras
import pytest

from tests.notebooks import execute

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


def examples() -> list:
    """Where each example stands, and its code: test parameters."""
    found = [("README.md", (ROOT / "README.md").read_text(encoding="utf-8"))]
    for path in sorted((ROOT / "keras_gemma").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                name = f"{path.relative_to(ROOT)}:{getattr(node, 'name', '')}"
                found.append((name, ast.get_docstring(node) or ""))
    return [
        pytest.param(code, id=f"{name}-{i}")
        for name, text in found
        for i, code in enumerate(BLOCK.findall(text))
    ]


def test_there_are_examples():
    assert len(examples()) > 8


@pytest.mark.parametrize("code", examples())
def test_example(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "example", "exec"), {})


def test_training_from_scratch(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "examples")
    import train_from_scratch

    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"{i} and {i} are {2 * i}." for i in range(600)))
    options = ["--vocabulary-size", "392", "--sequence-length", "32", "--batch-size", "2"]
    command = ["x", str(text), str(tmp_path / "preset"), *options, "--steps", "12"]
    monkeypatch.setattr("sys.argv", command)
    train_from_scratch.main()
    assert "bigrams: held-out loss" in capsys.readouterr().out
    from keras_gemma import GemmaCausalLM

    lm = GemmaCausalLM.from_preset(tmp_path / "preset")
    assert lm.dtype == "float32"
    assert keras.backend.standardize_dtype(lm.backbone.token_embedding.tensor.dtype) == "float32"


def test_looking_inside(monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("MPLBACKEND", "agg")
    path = ROOT / "examples" / "look_inside.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    saved = [data for cell in notebook["cells"] for data in kinds(cell)]
    assert saved.count("image/png") == 6 and saved.count("text/html") == 2
    shown = execute(notebook)
    assert [data for cell in notebook["cells"] for data in kinds(cell)] == saved
    assert sum(hasattr(value, "savefig") for value in shown) == 6
    assert sum(hasattr(value, "_repr_html_") for value in shown) >= 2


def kinds(cell):
    """The MIME types of what a notebook's cell shows."""
    return [kind for output in cell.get("outputs", []) for kind in output.get("data", {})]
