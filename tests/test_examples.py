"""Runs every example of the README, the pages and the docstrings without changes."""

import ast
import json
import re
import shutil
import subprocess
import warnings
from pathlib import Path

import keras
import pytest

from keras_gemma.storage.hub.locate import resolve
from tests.notebooks import REAL_MODEL, execute, printed, read_notebook

ROOT = Path(__file__).parents[1]
COMMITS = int(
    subprocess.run(
        ["git", "rev-list", "--count", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    or 0
)
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


def examples() -> list:
    """Returns place and code of each example, as test parameters."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    found = [(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")) for path in pages]
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


def test_examples_exist():
    assert len(examples()) > 8


def runs_here(i: int) -> bool:
    """Returns True on JAX, and on the other backends for a third that changes with every commit."""
    backends = ("torch", "tensorflow", "jax")
    third = backends.index(keras.config.backend())
    return third == 2 or (i + COMMITS) % 3 == third


def in_turn(i: int) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not runs_here(i), reason="the turn of another backend")


def example_runs_here(i: int, place: str, code: str) -> bool:
    """Returns True for a SavedModel on TensorFlow only. Others write it in a slow subprocess.

    On JAX and PyTorch, `test_fresh_start.py` runs the README and the pages.
    """
    if "served_gemma" in code:
        return keras.config.backend() == "tensorflow"
    is_page = not place.startswith("keras_gemma")
    return runs_here(i) and not (is_page and keras.config.backend() != "tensorflow")


@pytest.mark.parametrize(
    "code",
    [
        example
        for i, example in enumerate(examples())
        if example_runs_here(i, example.id, *example.values)
    ],
)
def test_example(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "example", "exec"), {})


@in_turn(0)
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


@pytest.mark.parametrize(
    ("name", "packages"),
    [
        ("get_started", []),
        pytest.param("migrate_from_keras_hub", ["keras_hub"], marks=in_turn(1)),
        pytest.param("migrate_from_transformers", ["torch", "transformers"], marks=in_turn(2)),
    ],
)
def test_notebook(name, packages, tmp_path, monkeypatch):
    check_notebook(name, packages, tmp_path, monkeypatch)


@in_turn(2)
def test_kaggle_notebook(tmp_path, monkeypatch):
    """Reads an attached model, and keeps the adapter in the folder of outputs."""
    name = "gemma_tiny_instruct_en"
    attached = tmp_path / "input/models/keras/gemma/keras" / name / "1"
    shutil.copytree(resolve(name), attached)
    monkeypatch.chdir(tmp_path)
    working = tmp_path / "working"
    working.mkdir()
    notebook = read_notebook("kaggle_gemma")
    handle, *saved = printed(notebook)
    changes = {"/kaggle/input": str(tmp_path / "input"), "/kaggle/working": str(working)}
    execute(notebook, changes=changes | {f'MODEL = "{name}"': f"MODEL = {str(attached)!r}"})
    assert printed(notebook) == [f"{attached}\n{handle}", *saved]
    assert [path.name for path in working.iterdir()] == ["my_adapter"]


@in_turn(0)
def test_prompting(tmp_path, monkeypatch):
    check_notebook("prompting", [], tmp_path, monkeypatch)


@pytest.mark.skipif(keras.config.backend() != "jax", reason="runs the three in any case")
def test_three_backends(tmp_path, monkeypatch):
    check_notebook("three_backends", ["jax", "torch", "tensorflow"], tmp_path, monkeypatch)


def check_notebook(name, packages, tmp_path, monkeypatch):
    """Runs a notebook on any backend and compares the printed text with the saved one.

    Cells of the real model are left out: `test_real_notebooks.py` runs them.
    """
    for package in packages:
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    notebook = read_notebook(name)
    saved = printed(notebook)
    assert saved
    keras.utils.clear_session()  # numbers layers from 0
    with warnings.catch_warnings():
        if packages:
            warnings.simplefilter("ignore")  # those of the libraries that are compared
        execute(notebook, leave_out=REAL_MODEL)
    assert printed(notebook) == saved


@in_turn(2)
def test_a_tiny_model_that_follows_instructions(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "examples")
    import instruct_accuracy
    import instruct_data
    import tune_tiny_instruct

    data, preset = tmp_path / "data", tmp_path / "preset"
    small = {"drills": 20, "conversations": 20, "longer": 20, "lasts": 20}
    instruct_data.make(data, **small, each=1, length=128, seed=0)
    said = {path.name: path.read_text() for path in data.iterdir()}
    instruct_data.make(data, **small, each=1, length=128, seed=0)
    assert said == {path.name: path.read_text() for path in data.iterdir()}

    monkeypatch.setitem(tune_tiny_instruct.ARCHITECTURE, "num_layers", 1)
    monkeypatch.delitem(tune_tiny_instruct.STAGES, "drills")
    command = ["x", str(data), str(preset), "--run", str(tmp_path / "run"), "--steps", "2"]
    monkeypatch.setattr("sys.argv", command)
    tune_tiny_instruct.main()
    assert (preset / "model.weights.h5").stat().st_size < 8e6
    monkeypatch.setattr("sys.argv", ["x", str(preset), str(data / "held_out.jsonl")])
    instruct_accuracy.main()
    assert "| second turn | 1 | 0.0% |" in capsys.readouterr().out


@pytest.mark.once
def test_calendar_messages():
    """No message is in two files, and each entry says what its message says."""
    examples = [
        json.loads(line)
        for name in ("train", "validation", "test")
        for line in (ROOT / f"examples/data/calendar_{name}.jsonl").read_text("utf-8").splitlines()
    ]
    assert len({example["prompt"] for example in examples}) == len(examples) == 120 + 24 + 24
    assert len({example["completion"] for example in examples}) == len(examples)
    for example in examples:
        message, (_, day, time, place) = example["prompt"], example["completion"].split(" | ")
        assert day in message and re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d", time), message
        assert place == "-" or place.lower() in message.lower(), message


@pytest.mark.once
def test_training_data_has_no_held_out_items(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    from instruct_data import SHARES, Writer

    held_out, train = Writer(held_out=True, seed=0), Writer(held_out=False, seed=0)
    questions = {
        item["messages"][-2]["content"].strip("?.! ").lower()
        for skill in SHARES
        for item in held_out.items(skill, 40)
    }
    asked = {
        message["content"].strip("?.! ").lower()
        for _ in range(5000)
        for message in train.conversation(128, SHARES)
    }
    assert len(questions) > 150 and not questions & asked
    assert not {train.word().lower() for _ in range(5000)} & held_out.held_out_words
