"""The application: its commands, exit codes and error messages.

Exit codes: 0 success, 1 failure, 2 wrong usage, 130 Ctrl-C. An error is one or two lines on stderr.
"""

import functools
import sys
from types import TracebackType

import typer

from keras_gemma.cli.bench import bench
from keras_gemma.cli.chat import chat
from keras_gemma.cli.convert import convert, quantize
from keras_gemma.cli.evaluate import evaluate
from keras_gemma.cli.export import export
from keras_gemma.cli.finetune import finetune
from keras_gemma.cli.generate import generate
from keras_gemma.cli.info import info
from keras_gemma.cli.leaderboard import leaderboard
from keras_gemma.cli.messages import error_lines, in_options, option_names, usage_message
from keras_gemma.cli.presets import presets
from keras_gemma.cli.score import score
from keras_gemma.cli.serve import serve
from keras_gemma.version import __version__

app = typer.Typer(
    name="keras-gemma",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
COMMANDS = (
    chat,
    generate,
    score,
    serve,
    presets,
    info,
    convert,
    quantize,
    finetune,
    evaluate,
    leaderboard,
    export,
    bench,
)
for command in COMMANDS:
    app.command()(command)

READABLE = (ValueError, TypeError, OSError, ImportError, FloatingPointError)
"""Errors that are printed without their type, because their messages say what to do."""


def print_version(is_requested: bool) -> None:
    if is_requested:
        print(f"keras-gemma {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(
        False, "--version", callback=print_version, is_eager=True, help="Show the version and exit."
    ),
) -> None:
    """Gemma language models on Keras 3."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command with `arguments`, or those of the process, and returns the exit code.

    Exceptions of a command reach `sys.excepthook`, which prints them; Python then exits with 1.
    """
    arguments = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    group = typer.main.get_command(app)
    command = group.commands.get(arguments[0])
    names = option_names(command) if command else {}
    sys.excepthook = functools.partial(report, names=names)
    try:
        code = group(arguments, prog_name="keras-gemma", standalone_mode=False)
    except typer.TyperException as error:
        print(f"error: {in_options(usage_message(error), names)}", file=sys.stderr)
        program = f"keras-gemma {command.name}" if command else "keras-gemma"
        print(f"Run {program} --help to see the usage.", file=sys.stderr)
        return error.exit_code
    except typer.Abort as abort:  # typer's own name of Ctrl-C
        raise KeyboardInterrupt from abort
    return code or 0


def report(
    kind: type[BaseException],
    error: BaseException,
    _: TracebackType | None,
    names: dict[str, str] | None = None,
) -> None:
    """Prints `error` to stderr, in at most two lines. `names` has the options of arguments."""
    lines = [in_options(line, names or {}) for line in error_lines(kind, error, READABLE)]
    print("error:", "\n".join(lines), file=sys.stderr)
