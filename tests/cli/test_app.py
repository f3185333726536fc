"""Exit codes, errors and output of the command, in a subprocess only if the process matters."""

import importlib.metadata
import io
import json
import os
import subprocess
import sys

import keras
import pytest
import typer

from keras_gemma.cli import main
from keras_gemma.cli.app import app, report
from keras_gemma.cli.messages import in_options, option_names
from keras_gemma.hub_caches import own_cache
from tests.cli.process import COMMAND, PREAMBLE, ROOT, run

HEAVY = ("keras", "numpy", "kagglehub", "huggingface_hub")


def test_commands_that_need_no_keras(command_environment):
    commands = [
        ["--help"],
        ["generate", "--help"],
        ["bench", "--help"],
        ["presets"],
        ["info", "2b"],
    ]
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
    assert facts["device"] in ("cpu", "gpu") and facts["free memory"].endswith(" GB")
    assert facts["own cache"] == str(own_cache())


@pytest.mark.once
def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"keras-gemma {importlib.metadata.version('keras-gemma')}\n"


@pytest.mark.once
@pytest.mark.parametrize("arguments", [[], ["-h"], ["generate", "-h"]])
def test_help(arguments, capsys):
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert "Usage: keras-gemma" in printed.out and printed.err == ""


@pytest.mark.once
@pytest.mark.parametrize(
    ("words", "expected"),
    [("keras-gemma gene", "generate"), ("keras-gemma chat --model gemma_tiny", "gemma_tiny_en")],
)
def test_shell_completion(words, expected, command_environment):
    """The shell's script calls the command with these variables."""
    command_environment |= {
        "_KERAS_GEMMA_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(words.count(" ")),
    }
    assert expected in run([], command_environment).stdout.split()


@pytest.mark.once
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate"], "standard input is empty"),
        (["generate", "x", "--sampler", "best"], "--sampler"),
        (["generate", "x", "--sampler", "greedy", "--top-k", "3"], "does not use --top-k"),
        (["generate", "x", "--temperature", "-1"], "equal to 0. Received: -1"),
        (["generate", "x", "-n", "foo"], "--max-new-tokens must be a valid integer. Received: foo"),
        (["generate", "x", "--sampler", "best"], "'--sampler': 'best' is not one of"),
        (["generate", "x", "--preset", "gemma2_2b_en"], "To choose a model, pass --model"),
        (["chat", ""], "the message is empty"),
        (["chat", " "], "the message is empty"),
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
    assert printed.err.endswith(f"Run keras-gemma {arguments[0]} --help to see the usage.\n")
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
@pytest.mark.parametrize("module", ["typer", "keras"])
def test_interrupt_prints_no_traceback(module, command_environment, tmp_path):
    """Ctrl-C while the command or the model's package is imported."""
    (tmp_path / f"{module}.py").write_text("raise KeyboardInterrupt")
    paths = f"{tmp_path}{os.pathsep}{command_environment.get('PYTHONPATH', '')}"
    result = run(["generate", "x"], command_environment | {"PYTHONPATH": paths})
    assert (result.returncode, result.stdout, result.stderr.strip()) == (130, "", "")


@pytest.mark.skipif(keras.config.backend() != "torch", reason="imports PyTorch")
def test_pytorch_logs_errors_only(command_environment):
    """Its compiler warns on machines that have CUDA's compiler and no GPU."""
    program = (
        f"{PREAMBLE}from keras_gemma.cli.options import silence_frameworks; silence_frameworks(); "
        "import torch, logging; log = logging.getLogger('torch.utils.cpp_extension'); "
        "print(log.isEnabledFor(logging.WARNING), log.isEnabledFor(logging.ERROR))"
    )
    command = [sys.executable, "-c", program]
    printed = subprocess.check_output(command, env=command_environment, cwd=ROOT, text=True)
    assert printed == "False True\n"


@pytest.mark.once
def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="gemma_tiny_fr"):
        main(["generate", "x", "--model", "gemma_tiny_fr", "--debug"])
    assert sys.excepthook is sys.__excepthook__


def test_unsupported_backend(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "numpy")
    with pytest.raises(ValueError, match=r"^KERAS_BACKEND must be one of"):
        main(["info"])
    assert sys.excepthook.func is report


@pytest.mark.parametrize("arguments", [["presets"], ["info", "2b", "--json"]])
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
        (PermissionError(13, "Permission denied", "/x/y"), "error: /x/y: Permission denied\n"),
        (ValueError("x" * 10_000), f"error: {'x' * 600} ... (--debug shows more)\n"),
        (ValueError("one\ntwo\nthree"), "error: one\ntwo (--debug shows more)\n"),
    ],
)
def test_report(error, expected, capsys):
    report(type(error), error, None)
    assert capsys.readouterr().err == expected


@pytest.mark.once
@pytest.mark.parametrize(
    ("command", "message", "expected"),
    [
        ("generate", "change `max_new_tokens`", "change --max-new-tokens"),
        ("generate", "Received: top_p=3.0", "Received: --top-p 3.0"),
        ("generate", "`preset` names", "--model names"),
        ("generate", "Received: preset='a b'", "Received: --model 'a b'"),
        ("generate", "Prompt 0 has no tokens", "Prompt 1 has no tokens"),
        ("convert", "`preset` names", "SOURCE names"),
        ("convert", "`preset_dir` must be a folder", "TARGET must be a folder"),
        ("export", "name another, or pass overwrite=True.", "name another, or pass --overwrite."),
        ("export", "pass `overwrite=True`", "pass --overwrite"),
        ("bench", "Received: prompt=8190, new=32", "Received: --prompt 8190, --new 32"),
        ("bench", "backend='torch', but torch is", "--backend torch, but torch is"),
        ("evaluate", "pass run_programs='unsafe'. Missing", "pass --unsafe-programs. Missing"),
        ("finetune", "or skip them (`skip_bad`)", "or skip them (--skip-bad)"),
        (
            "chat",
            "`min_p` must be in [0, 1], or a list with one for each row.",
            "--min-p must be in [0, 1].",
        ),
        ("generate", "`logits_processors` of a model", "`logits_processors` of a model"),
    ],
)
def test_messages_name_options(command, message, expected):
    names = option_names(typer.main.get_command(app).commands[command])
    assert in_options(message, names) == expected
