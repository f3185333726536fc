"""Exit codes, errors and output of the command, in a subprocess only if the process matters."""

import io
import json
import os
import subprocess
import sys

import keras
import pytest

from keras_gemma.cli import main
from keras_gemma.cli.app import report
from tests.cli.process import COMMAND, PREAMBLE, ROOT, run

HEAVY = ("keras", "numpy", "kagglehub", "huggingface_hub")


def test_commands_that_need_no_keras(command_environment):
    commands = [["--help"], ["generate", "--help"], ["bench", "--help"], ["presets"], ["info"]]
    code = f"{PREAMBLE}[main(command) for command in {commands}]; "
    code += f"sys.exit(str(set({HEAVY}) & set(sys.modules) or ''))"
    result = subprocess.run(
        [sys.executable, "-c", code], env=command_environment, capture_output=True, text=True
    )
    assert result.stderr.strip() == ""
    assert "--shape" in result.stdout and "\x1b" not in result.stdout


def test_info(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["backend"] == keras.config.backend()
    assert facts["keras"] and facts["keras-gemma"]


@pytest.mark.once
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing command"),
        (["generate"], "standard input is empty"),
        (["generate", "x", "--sampler", "best"], "--sampler"),
        (["generate", "x", "--sampler", "greedy", "--top-k", "3"], "does not use `top_k`"),
        (["generate", "x", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["generate", "x", "--backend", "numpy"], "--backend"),
        (["generate", "x", "--nonsense"], "--nonsense"),
    ],
)
def test_wrong_usage(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err.splitlines()[0]
    assert len(printed.err.splitlines()) == 2
    assert printed.out == ""


@pytest.mark.once
def test_failure_prints_a_short_error(command_environment):
    result = run(["generate", "x", "--model", "gemma_tiny_fr"], command_environment)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert "gemma_tiny_fr" in result.stderr
    assert len(result.stderr.splitlines()) <= 2
    assert result.stdout == ""


@pytest.mark.once
def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="gemma_tiny_fr"):
        main(["generate", "x", "--model", "gemma_tiny_fr", "--debug"])
    assert sys.excepthook is sys.__excepthook__


def test_unsupported_backend(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "numpy")
    with pytest.raises(ValueError, match=r"^KERAS_BACKEND must be one of"):
        main(["info"])
    assert sys.excepthook is report


@pytest.mark.parametrize("arguments", [["presets"], ["info", "--json"]])
def test_closed_pipe_is_not_an_error(command_environment, arguments):
    """The pipe is closed before all is written, as by `| head`."""
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run(
        [*COMMAND, *arguments],
        env=command_environment,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=write,
        stderr=subprocess.PIPE,
    )
    os.close(write)
    assert (result.returncode, result.stderr) == (0, b"")


def test_generates_from_a_pipe(command_environment):
    """Prints the text of the built-in model to stdout, and nothing to stderr."""
    result = run(["generate", "--max-new-tokens", "4"], command_environment, stdin="ROMEO:\n")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("ROMEO:")
    assert len(result.stdout) > len("ROMEO:\n")
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("what, and the remedy"), "error: what, and the remedy\n"),
        (KeyError("name"), "error: KeyError: 'name'\n"),
        (RuntimeError(), "error: RuntimeError: \n"),
        (ValueError("one\n\ntwo"), "error: one\ntwo\n"),
        (ValueError("one\ntwo\nthree"), "error: one\ntwo (--debug shows more)\n"),
    ],
)
def test_report(error, expected, capsys):
    report(type(error), error, None)
    assert capsys.readouterr().err == expected
