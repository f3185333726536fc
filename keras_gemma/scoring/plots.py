"""Plots of scoring results, with matplotlib.

Each function takes one result and returns a figure, which a notebook shows and `savefig` saves.
Needs matplotlib, which the extra `plots` installs. Computes nothing. Characters that
matplotlib's font lacks, such as Chinese ones, show as boxes; set `font.family` to a font that has
them.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_gemma.extras import install_hint
from keras_gemma.scoring.attribution import Attribution
from keras_gemma.scoring.coloring import (
    ATTRIBUTIONS,
    check_result,
    color_attribution,
    color_surprisal,
)
from keras_gemma.scoring.lens import AttentionMaps, LogitLens
from keras_gemma.scoring.patching import Patching
from keras_gemma.scoring.perplexity import TokenScores

SEQUENTIAL, DIVERGING = "cividis", "PuOr_r"
"""Color maps that are safe for color blindness, for values from zero and around zero."""

BLUE, ORANGE = "#0072B2", "#D55E00"
"""Bar colors, from Okabe and Ito's palette for color blindness."""

MAX_LABEL_CHARS = 12
"""Maximum length of a token's label on an axis, in characters."""

MAX_CELL_CHARS = 8
"""Maximum length of a token's label in a cell of the logit lens, in characters."""

MAX_WIDTH_INCHES = 10.0
"""Maximum width of the attention maps of several heads; a notebook shrinks wider figures."""

__all__ = [
    "attention",
    "attribution",
    "color_attribution",
    "color_surprisal",
    "logit_lens",
    "patching",
    "surprisal",
]


def surprisal(scores: TokenScores) -> Any:
    """Plots the surprisal of each token as bars, in bits.

    Args:
        scores: Result of `score_tokens`.

    Returns:
        A matplotlib figure.
    """
    check_result(scores, TokenScores, "`score_tokens`")
    figure, axes = _figure(_width(len(scores.tokens)), 3.5)
    axes.bar(range(len(scores.tokens)), np.nan_to_num(scores.surprisal), color=BLUE)
    axes.set_title(f"Surprisal of each token (perplexity {scores.perplexity:.2f})")
    axes.set_ylabel("surprisal (bits)")
    _token_ticks(axes, scores.tokens, "token")
    return figure


def attribution(shares: Attribution) -> Any:
    """Plots the attribution of each prompt token as bars, in nats.

    Args:
        shares: Result of `gradient_times_input` or `integrated_gradients`.

    Returns:
        A matplotlib figure.
    """
    check_result(shares, Attribution, ATTRIBUTIONS)
    figure, axes = _figure(_width(len(shares.tokens)), 3.5)
    colors = [ORANGE if score > 0 else BLUE for score in shares.scores]
    axes.bar(range(len(shares.tokens)), shares.scores, color=colors)
    axes.axhline(0.0, color="black", linewidth=0.8)
    axes.set_title(f"Attribution of “{label(shares.answer)}” as the next token ({shares.method})")
    axes.set_ylabel("share of log p (nats)")
    _token_ticks(axes, shares.tokens, "token of the prompt")
    return figure


def logit_lens(lens: LogitLens) -> Any:
    """Plots the most likely next token after each block, with its probability as color.

    Args:
        lens: Result of `logit_lens`.

    Returns:
        A matplotlib figure.
    """
    check_result(lens, LogitLens, "`logit_lens`")
    rows, columns = lens.probabilities.shape
    figure, axes = _figure(_width(columns, 0.6), 1.8 + 0.36 * rows)
    image = axes.imshow(
        lens.probabilities, cmap=SEQUENTIAL, vmin=0, vmax=1, aspect="auto", origin="lower"
    )
    for row in range(rows):
        for column in range(columns):
            axes.text(
                column,
                row,
                label(lens.predictions[row][column], MAX_CELL_CHARS),
                ha="center",
                va="center",
                fontsize=8,
                color="black" if lens.probabilities[row, column] > 0.55 else "white",
            )
    axes.set_title("Most likely next token after each block")
    axes.set_yticks(range(rows), lens.stages)
    axes.set_ylabel("residual after")
    _token_ticks(axes, lens.tokens, "token read")
    figure.colorbar(image, ax=axes, label="probability of that token")
    return figure


def attention(maps: AttentionMaps, heads: Sequence[int] | None = None) -> Any:
    """Plots the attention weights of each head: queries are rows, keys are columns.

    Args:
        maps: Result of `attention_maps`.
        heads: Indices of the heads to draw. All by default.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: If a head does not exist.
    """
    check_result(maps, AttentionMaps, "`attention_maps`")
    count = len(maps.weights)
    chosen = np.arange(count) if heads is None else np.asarray(heads)
    are_whole = chosen.ndim == 1 and chosen.dtype.kind in "iu"
    if not are_whole or not np.isin(chosen, range(count)).all():
        raise ValueError(
            f"`heads` must be a list of indices in [0, {count - 1}]. Received: heads={heads!r}"
        )
    heads = chosen.tolist()
    side = max(2.4, 0.17 * len(maps.tokens) + 0.8)
    columns = min(len(heads), max(1, int(MAX_WIDTH_INCHES // side)))
    rows = -(-len(heads) // columns)
    figure, grid = _figures(side * columns + 1.6, side * rows + 0.9, rows, columns)
    figure.set_layout_engine("compressed")  # squares leave room, which would separate the titles
    cells = list(grid.flat)
    for axes in cells[len(heads) :]:
        axes.set_visible(False)
    for index, (axes, head) in enumerate(zip(cells, heads, strict=False)):
        image = axes.imshow(maps.weights[head], cmap=SEQUENTIAL, vmin=0, vmax=1)
        axes.set_title(f"head {head}", fontsize=10)
        is_lowest = index + columns >= len(heads)
        _token_ticks(axes, maps.tokens if is_lowest else (), "key" if is_lowest else "")
        if index % columns == 0:
            labels = [label(token) for token in maps.tokens]
            axes.set_yticks(range(len(labels)), labels, fontsize=9)
            axes.set_ylabel("query")
        else:
            axes.set_yticks([])
    figure.suptitle(f"Attention in block {maps.layer}")
    figure.colorbar(image, ax=cells, label="attention weight (a row sums to 1)")
    return figure


def patching(grid: Patching) -> Any:
    """Plots the percentage of the answer that each patch recovers, by block and position.

    Args:
        grid: Result of `activation_patching`.

    Returns:
        A matplotlib figure.
    """
    check_result(grid, Patching, "`activation_patching`")
    rows, columns = grid.scores.shape
    figure, axes = _figure(_width(columns), 2.4 + 0.3 * rows)
    percent = 100 * grid.recovered
    largest = max(100.0, float(np.abs(percent).max()))
    image = axes.imshow(
        percent, cmap=DIVERGING, vmin=-largest, vmax=largest, aspect="auto", origin="lower"
    )
    axes.set_title(f"log p(“{label(grid.answer)}”) recovered by a clean {grid.hook_point}")
    axes.set_yticks(range(rows), [str(row) for row in range(rows)])
    axes.set_ylabel("block")
    pairs = zip(grid.tokens, grid.corrupted_tokens, strict=True)
    names = [clean if clean == other else f"{other} → {clean}" for clean, other in pairs]
    _token_ticks(axes, names, "position patched (corrupted → clean)", 2 * MAX_LABEL_CHARS)
    figure.colorbar(image, ax=axes, label="recovered (%)")
    return figure


def label(token: str, longest: int = MAX_LABEL_CHARS) -> str:
    """Formats a token for an axis: on one line, shortened, with `$` escaped for matplotlib."""
    token = token.replace("\n", "↵").replace("\t", "⇥")
    if len(token) > longest:
        token = token[: longest - 1] + "…"
    return token.replace("$", r"\$")


def _width(tokens: int, each: float = 0.3) -> float:
    """Returns a figure's width in inches; a notebook shrinks figures wider than about ten."""
    return max(6.0, 2.0 + each * tokens)


def _token_ticks(
    axes: Any, tokens: Sequence[str], name: str, longest: int = MAX_LABEL_CHARS
) -> None:
    labels = [label(token, longest) for token in tokens]
    axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=9)
    axes.set_xlabel(name)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    """Returns a figure of the size in inches, and its only axes."""
    figure, grid = _figures(width, height, 1, 1)
    return figure, grid[0, 0]


def _figures(width: float, height: float, rows: int, columns: int) -> tuple[Any, Any]:
    """Returns a figure of the size in inches, and an array of its axes."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            f"Plots need matplotlib. {install_hint('plots')} `color_surprisal` and "
            "`color_attribution` work without it."
        ) from error
    figure, grid = pyplot.subplots(
        rows, columns, figsize=(width, height), layout="constrained", squeeze=False
    )
    pyplot.close(figure)  # otherwise a notebook shows it twice
    return figure, grid
