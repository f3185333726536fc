"""Texts with a color for each token, in HTML, for notebooks and files.

Positive values are orange, negative values are blue. The colors are safe for color blindness and
light enough for black text. Each token's tooltip shows its value.
"""

import dataclasses
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from keras_gemma.scoring.attribution import Attribution
from keras_gemma.scoring.perplexity import TokenScores

MORE = (240, 150, 40)
LESS = (110, 175, 225)
"""RGB colors of the largest positive and negative values."""

ATTRIBUTIONS = "`gradient_times_input` or `integrated_gradients`"
"""Names of the functions that return an `Attribution`, for error messages."""

SPACE, NEWLINE = "▁", "\n"


@dataclasses.dataclass(frozen=True)
class ColoredTokens:
    """Tokens with one value each. Notebooks show them in color; `str()` returns the HTML.

    Attributes:
        tokens: Tokens of the tokenizer, with `▁` for a space.
        values: One value for each token. NaN is white.
        title: Title, such as the measured quantity.
        unit: Unit of the values.

    Example:

    ```python
    from pathlib import Path

    from keras_gemma.scoring import ColoredTokens

    colored = ColoredTokens(["▁To", "▁be"], [3.1, -0.2], "How much each token helps", "nats")
    Path("colored.html").write_text(str(colored), encoding="utf-8")
    ```
    """

    tokens: Sequence[str]
    values: Sequence[float]
    title: str
    unit: str

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.values):
            raise ValueError(
                "`values` must have one number for each token of `tokens`. "
                f"Received: {len(self.values)} values, {len(self.tokens)} tokens"
            )

    def __str__(self) -> str:
        values = np.asarray(self.values, "float64")
        finite = values[np.isfinite(values)]
        largest = float(np.abs(finite).max()) if finite.size else 0.0
        spans = "".join(
            self._span(token, value, largest)
            for token, value in zip(self.tokens, values, strict=True)
        )
        ends = [-largest, 0.0, largest] if (finite < 0).any() else [0.0, largest]
        legend = " ".join(
            f'<span style="background:{color(end, largest)};padding:0 .5em">{end:.2f}</span>'
            for end in ends
        )
        return (
            '<div style="background:#fff;color:#000;padding:.5em;font-family:monospace;'
            'line-height:1.8;max-width:60em">'
            f"<div><b>{escape(self.title)}</b> {legend} {escape(self.unit)}</div>"
            f'<div style="white-space:pre-wrap">{spans}</div></div>'
        )

    def _repr_html_(self) -> str:
        return str(self)

    def _span(self, token: str, value: float, largest: float) -> str:
        written = escape(token.replace(SPACE, " ")).replace(NEWLINE, "↵<br>")
        number = f"{value:.3f} {self.unit}" if np.isfinite(value) else "not measured"
        tip = escape(f"{token.replace(NEWLINE, '↵')}: {number}")
        style = f"background:{color(value, largest)};margin-right:1px"
        return f'<span title="{tip}" style="{style}">{written}</span>'


def color(value: float, largest: float) -> str:
    """Returns `#rrggbb`: white for zero and NaN, `MORE` and `LESS` for plus and minus `largest`."""
    if not np.isfinite(value) or not largest:
        return "#ffffff"
    share = min(abs(value) / largest, 1.0)
    end = MORE if value > 0 else LESS
    return "#" + "".join(f"{round(255 + (part - 255) * share):02x}" for part in end)


def check_result(result: Any, kind: type, maker: str) -> None:
    """Raises a TypeError if `result` is not of the type that the functions of `maker` return."""
    if not isinstance(result, kind):
        raise TypeError(
            f"The argument must be a `{kind.__name__}`, the result of {maker} of "
            f"`keras_gemma.scoring`. Received: {result!r:.80} of type {type(result).__name__}"
        )


def color_surprisal(scores: TokenScores) -> ColoredTokens:
    """Colors each token by its surprisal, in bits.

    Args:
        scores: Result of `score_tokens`.

    Returns:
        The colored tokens; larger surprisal is darker orange.
    """
    check_result(scores, TokenScores, "`score_tokens`")
    title = f"Surprisal of each token (perplexity {scores.perplexity:.2f})"
    return ColoredTokens(scores.tokens, scores.surprisal, title, "bits")


def color_attribution(shares: Attribution) -> ColoredTokens:
    """Colors each prompt token by its attribution, in nats.

    Args:
        shares: Result of `gradient_times_input` or `integrated_gradients`.

    Returns:
        The colored tokens; orange supports the answer, blue opposes it.
    """
    check_result(shares, Attribution, ATTRIBUTIONS)
    title = f"Attribution of {shares.answer!r} as the next token ({shares.method})"
    return ColoredTokens(shares.tokens, shares.scores, title, "nats")
