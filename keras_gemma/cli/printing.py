"""Texts to standard output: as they are into a pipe, and harmless to a terminal."""

import re
import sys

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""What moves a cursor, colors or names a window: all that is no new line and no tab."""


def show(text: str = "", end: str = "\n") -> None:
    """Print `text`, which a model or a stranger wrote, at once.

    To a terminal its control characters are not printed, so that it can give it no orders.
    """
    print(printable(text) if sys.stdout.isatty() else text, end=end, flush=True)


def printable(text: str) -> str:
    """`text` without control characters, but for new lines and tabs."""
    return CONTROL.sub("", text)
