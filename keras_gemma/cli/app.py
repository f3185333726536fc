"""The application: its commands, exit codes and error messages.

Exit codes: 0 success, 1 failure, 2 wrong usage. An error is one or two lines on stderr.
"""

import sys
from types import TracebackType

import typer

from keras_gemma.cli.bench import bench
from keras_gemma.cli.chat import chat
from keras_gemma.cli.convert import convert, quantize
from keras_gemma.cli.export import export
from keras_gemma.cli.finetune import finetune
from keras_gemma.cli.generate import generate
from keras_gemma.cli.info import info
from keras_gemma.cli.presets import presets
from keras_gemma.cli.score import score

app = typer.Typer(
    name="keras-gemma",
    help="Gemma language models on Keras 3.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
COMMANDS = (chat, generate, score, presets, info, convert, quantize, finetune, export, bench)
for command in COMMANDS:
    app.command()(command)

READABLE = (ValueError, TypeError, OSError, ImportError, FloatingPointError)
"""Errors that are printed without their type, because their messages say what to do."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command with `arguments`, or those of the process, and returns the exit code.

    Exceptions of a command reach `sys.excepthook`, which prints them; Python then exits with 1.
    """
    sys.excepthook = report
    command = typer.main.get_command(app)
    try:
        code = command(arguments, prog_name="keras-gemma", standalone_mode=False)
    except typer.TyperException as error:
        print(f"error: {error.format_message()}", file=sys.stderr)
        print("Run keras-gemma COMMAND --help to see the usage.", file=sys.stderr)
        return error.exit_code
    return code or 0


def report(kind: type[BaseException], error: BaseException, _: TracebackType | None) -> None:
    """Prints `error` to stderr, in at most two lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    if not issubclass(kind, READABLE):
        lines[0] = f"{kind.__name__}: {lines[0]}"
    if len(lines) > 2:
        lines[1] += " (--debug shows more)"
    print("error:", *lines[:1], file=sys.stderr)
    print(*lines[1:2], sep="\n", end="\n" if lines[1:] else "", file=sys.stderr)
