"""Output to a terminal or a pipe: tables, and text written by a model."""

import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Control characters except newline and tab: they could move the cursor or color the terminal."""

PIPE_WIDTH = 400
"""Maximum line length of a table in a pipe, in characters."""


def show(text: str = "", end: str = "\n") -> None:
    """Prints text from a model or another untrusted source, without buffering.

    In a terminal, control characters are removed, so that the text cannot control it.
    """
    print(printable(text) if sys.stdout.isatty() else text, end=end, flush=True)


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def printable(text: str) -> str:
    """Returns `text` without control characters except newlines and tabs."""
    return CONTROL.sub("", text)


def make_console() -> "Console":
    """Returns a console on standard output: with colors in a terminal, wide and plain in a pipe."""
    from rich.console import Console

    if sys.stdout.isatty():
        return Console()
    return Console(force_terminal=False, color_system=None, width=PIPE_WIDTH)


def make_table(columns: Sequence[tuple[str, bool]], rows: Sequence[Sequence[str]]) -> "Table":
    """Returns a table of `rows`. A column has a title, and True if its cells are numbers."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    box = SIMPLE_HEAD if sys.stdout.isatty() else None
    table = Table(box=box, pad_edge=False, header_style="bold")
    for i, (title, is_number) in enumerate(columns):
        justify = "right" if is_number else "left"
        table.add_column(title, justify=justify, style=None if i else "cyan")
    for row in rows:
        table.add_row(*row)
    return table
