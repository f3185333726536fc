"""The command as a process: what it prints where, its exit codes, and what it does not import."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

AS_INSTALLED = "import sys; sys.argv[0] = 'keras-gemma'; from keras_gemma.cli import main; "


def run(arguments, environment, *, stdin=None, after=""):
    """Run the command as the installed script does; `after` runs when it is done."""
    code = f"{AS_INSTALLED}code = main(); {after}\nsys.exit(code)"
    source = {"input": stdin} if stdin is not None else {"stdin": subprocess.DEVNULL}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        **source,
    )


@pytest.mark.once
@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["info"]])
def test_answers_without_keras(command_environment, arguments):
    result = run(arguments, command_environment, after="sys.exit('keras' in sys.modules)")
    assert result.returncode == 0, result.stderr
    assert "\x1b" not in result.stdout
    assert result.stderr == ""


def test_info(command_environment):
    result = run(["info", "--json"], command_environment)
    facts = json.loads(result.stdout)
    assert facts["backend"] == command_environment["KERAS_BACKEND"]
    assert facts["keras"] and facts["keras-gemma"]


@pytest.mark.once
@pytest.mark.parametrize(
    ("arguments", "says"),
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
def test_wrong_usage(command_environment, arguments, says):
    result = run(arguments, command_environment)
    assert result.returncode == 2
    assert says in result.stderr.splitlines()[0]
    assert len(result.stderr.splitlines()) == 2
    assert result.stdout == ""


@pytest.mark.once
def test_a_failure_is_short(command_environment):
    result = run(["generate", "x", "--model", "gemma_tiny_fr"], command_environment)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert "gemma_tiny_fr" in result.stderr
    assert len(result.stderr.splitlines()) <= 2
    assert result.stdout == ""


@pytest.mark.once
def test_debug_shows_the_traceback(command_environment):
    arguments = ["generate", "x", "--model", "gemma_tiny_fr", "--debug"]
    result = run(arguments, command_environment)
    assert result.returncode == 1
    assert "Traceback" in result.stderr


@pytest.mark.once
def test_unsupported_backend_is_an_error_not_a_traceback(command_environment):
    result = run(["info"], {**command_environment, "KERAS_BACKEND": "numpy"})
    assert result.returncode == 1
    assert result.stderr.startswith("error: KERAS_BACKEND must be one of")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["presets"], marks=pytest.mark.once),
        pytest.param(["presets", "--json"], marks=pytest.mark.once),
        pytest.param(["info", "--json"], marks=pytest.mark.once),
        ["generate", "ROMEO:", "--max-new-tokens", "1", "--json"],
    ],
)
def test_a_reader_that_leaves(command_environment, arguments):
    """What `| head` does when it has read enough."""
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run(
        [sys.executable, "-c", f"{AS_INSTALLED}sys.exit(main())", *arguments],
        env=command_environment,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=write,
        stderr=subprocess.PIPE,
    )
    os.close(write)
    assert (result.returncode, result.stderr) == (0, b"")


def test_generates_from_a_pipe(command_environment):
    """With the built-in preset: text on stdout, and nothing else anywhere."""
    result = run(["generate", "--max-new-tokens", "4"], command_environment, stdin="ROMEO:\n")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("ROMEO:")
    assert len(result.stdout) > len("ROMEO:\n")
    assert result.stderr == ""
