"""`keras-gemma leaderboard`: evaluated models next to each other.

Needs no model, and neither a framework nor lm-eval.
"""

import json
from pathlib import Path
from typing import Literal

from typer import Argument, BadParameter, Option

from keras_gemma.cli.options import JsonOption
from keras_gemma.cli.printing import make_console, make_table, show
from keras_gemma.evaluation.leaderboard import compare


def leaderboard(
    folders: list[Path] = Argument(
        ..., metavar="DIR", help="Folders that `keras-gemma evaluate --output` wrote."
    ),
    reference: Literal["first", "best"] = Option(
        "first", help="Model that the others are compared with. best: by the mean above chance."
    ),
    plot: Path | None = Option(None, help="Write a plot to this file, such as scores.png."),
    markdown: bool = Option(False, "--markdown", help="Print Markdown."),
    as_json: JsonOption = False,
) -> None:
    """Compare evaluated models: means, paired differences with standard errors, and a plot."""
    if markdown and as_json:
        raise BadParameter("pass --markdown or --json, not both", param_hint="--markdown")
    board = compare(folders, reference)
    if plot is not None:
        board.figure().savefig(plot)
    if as_json:
        show("\n".join(json.dumps(entry, ensure_ascii=False) for entry in board.as_dicts()))
    elif markdown:
        show(board.to_markdown())
    else:
        for titles, rows in board.tables():
            columns = [(title, i > 2) for i, title in enumerate(titles)]
            make_console().print(make_table(columns, rows))
