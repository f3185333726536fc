"""`keras-gemma evaluate`."""

import json

import pytest

from keras_gemma.cli import main
from tests.evaluation.conftest import COLORS, write


@pytest.fixture
def questions(tmp_path):
    """A folder of data with four questions of ARC."""
    choices = {"text": list(COLORS[:4]), "label": ["A", "B", "C", "D"]}
    rows = [{"question": f"Which is {i}?", "choices": choices, "answerKey": "A"} for i in range(4)]
    write(tmp_path / "data/arc_easy/test.jsonl", rows)
    return tmp_path / "data"


def test_results_are_printed_and_written(questions, tmp_path, capsys):
    arguments = ["evaluate", "--tasks", "arc_easy,boolq", "--data", str(questions)]
    arguments += ["--output", str(tmp_path / "out")]
    assert main([*arguments, "--samples", "2", "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert (result["task"], result["items"], result["of_items"]) == ("arc_easy", 2, 4)
    assert "skipped: " in captured.err and "boolq has no file validation.jsonl" in captured.err
    assert main([*arguments, "--resume"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("arc_easy: ") and "4 items; chance 25.0" in lines[0]
    assert lines[1].split() == ["metric", "shots", "items", "score", "card", "chance"]
    assert lines[-1] == f"results: {tmp_path / 'out'}"


@pytest.mark.once
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "helaswag"], "Similar names are hellaswag"),
        (["--tasks", "humaneval"], "`run_programs=True`"),
        (["--resume"], "`resume=True` needs `output`"),
    ],
)
def test_errors(arguments, message, questions):
    with pytest.raises(ValueError, match=message):
        main(["evaluate", "--tasks", "arc_easy", "--data", str(questions), *arguments])


@pytest.mark.once
def test_wrong_usage(questions, capsys):
    assert main(["evaluate", "--shots", "few"]) == 2
    assert "--shots" in capsys.readouterr().err
    assert main(["evaluate", "--data", str(questions / "none")]) == 2
    assert "--data" in capsys.readouterr().err


@pytest.mark.once
def test_missing_extra(monkeypatch):
    monkeypatch.setattr("keras_gemma.extras.is_installed", lambda package: False)
    with pytest.raises(ImportError, match=r'Benchmarks need lm-eval.*".\[evaluation\]"'):
        main(["evaluate", "--tasks", "arc_easy"])
