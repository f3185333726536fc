"""The command `keras-gemma`.

Knows terminals, pipes and exit codes. Each command imports Keras when it runs and not before, so
that `--help` answers at once.

    app.py        the application: its commands, exit codes and errors
    messages.py   error messages in the words of the command line
    options.py    options that several commands share, and their common start
    texts.py      texts from the command line, files and a pipe
    loading.py    loads a model, in a precision that fits into memory
    printing.py   tables, and safe output of generated text
    speed.py      the report of `--benchmark`
    chat.py       `keras-gemma chat`
    terminal.py   its conversation in a terminal
    keyboard.py   editor and Ctrl-C of the conversation
    generate.py   `keras-gemma generate`
    score.py      `keras-gemma score`
    serve.py      `keras-gemma serve`
    presets.py    `keras-gemma presets`
    info.py       `keras-gemma info`
    convert.py    `keras-gemma convert` and `quantize`
    finetune.py   `keras-gemma finetune`
    evaluate.py   `keras-gemma evaluate`
    leaderboard.py   `keras-gemma leaderboard`
    export.py     `keras-gemma export`
    bench.py      `keras-gemma bench`
"""

import os
import sys

__all__ = ["main"]

INTERRUPTED = 130
"""Exit code after Ctrl-C, as in shells."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command with `arguments`, or those of the process, and returns the exit code.

    If the reader of a pipe leaves early, as `head` does, the exit code is 0 and nothing is printed.
    After Ctrl-C, it is 130.
    """
    try:
        from keras_gemma.cli import app  # takes 0.1 s, in which Ctrl-C may come

        code = app.main(arguments)
        print(end="", flush=True)  # A closed pipe must raise here, not at exit.
    except KeyboardInterrupt:
        return INTERRUPTED
    except (BrokenPipeError, SystemExit) as error:
        # typer and rich turn a broken pipe into an exit.
        if not any(isinstance(e, BrokenPipeError) for e in (error, error.__context__)):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code
