"""Helpers of the tests of commands: a subprocess of the command, and a terminal."""

import io
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

PREAMBLE = "import sys; sys.argv[0] = 'keras-gemma'; from keras_gemma.cli import main; "
COMMAND = [sys.executable, "-c", f"{PREAMBLE}sys.exit(main())"]
"""Start of the command line, same as the installed script."""


class Terminal(io.StringIO):
    """Standard input or output that is a terminal."""

    def isatty(self):
        return True


def run(arguments, environment, stdin=None):
    """Runs the command, and returns the completed process."""
    source = {"input": stdin} if stdin is not None else {"stdin": subprocess.DEVNULL}
    return subprocess.run(
        [*COMMAND, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, **source
    )
