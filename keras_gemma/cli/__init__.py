"""The command `keras-gemma`.

Knows terminals, pipes and exit codes; each command imports Keras when it runs, not before, so
that `--help` answers at once.

    app.py        the application, its exit codes and its errors
    options.py    what several commands take, and how they begin
    loading.py    a model in bits that fit the machine
    printing.py   texts that a terminal takes no orders from
    speed.py      what `--benchmark` says
    chat.py       `keras-gemma chat`
    terminal.py   its conversation in a terminal
    generate.py   `keras-gemma generate`
    score.py      `keras-gemma score`
    presets.py    `keras-gemma presets`
    info.py       `keras-gemma info`
    convert.py    `keras-gemma convert` and `quantize`
    finetune.py   `keras-gemma finetune`
    export.py     `keras-gemma export`
    bench.py      `keras-gemma bench`
"""

import os
import sys

import typer

from keras_gemma.cli import app

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Run the command, as `app.main` does; returns the exit code.

    Where the reader of a pipe has read enough and left, as `head` does, that is 0, and not a word.

    Args:
        arguments: what follows `keras-gemma`; None for those of this process.
    """
    try:
        code = app.main(arguments)
        print(end="", flush=True)  # what is left is written here, or at the exit
    except (KeyboardInterrupt, typer.Abort):
        print(file=sys.stderr)
        return 1
    except (BrokenPipeError, SystemExit) as error:
        # typer and rich make an exit of it.
        if not any(isinstance(e, BrokenPipeError) for e in (error, error.__context__)):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code
