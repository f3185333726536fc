"""A text with a color for each token, in HTML, for a notebook or a file.

Colors are safe for the color-blind, and light enough for black letters: orange for more and, where
there is less than nothing, blue. The number stands in each token's tooltip.
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
"""Red, green and blue of the largest numbers, above and below zero."""

ATTRIBUTIONS = "`gradient_times_input` or `integrated_gradients`"
"""The functions that return an `Attribution`."""

SPACE, NEWLINE = "▁", "\n"


@dataclasses.dataclass(frozen=True)
class ColoredTokens:
    """Tokens and a number for each; a notebook shows it in color, `str` gives the HTML.

    Attributes:
        tokens: as the tokenizer writes them, with `▁` for a space.
        values: one number a token; NaN is left white.
        title: what was measured.
        unit: of the numbers.

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
                "`values` must hold a number for each of `tokens`. "
                f"Received: {len(self.values)} values, {len(self.tokens)} tokens"
            )

    def __str__(self) -> str:
        values = np.asarray(self.values, "float64")
        known = values[np.isfinite(values)]
        largest = float(np.abs(known).max()) if known.size else 0.0
        spans = "".join(
            self._span(token, value, largest)
            for token, value in zip(self.tokens, values, strict=True)
        )
        ends = [-largest, 0.0, largest] if (known < 0).any() else [0.0, largest]
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
    """White for nothing, `MORE` or `LESS` for plus or minus `largest`: `#rrggbb`."""
    if not np.isfinite(value) or not largest:
        return "#ffffff"
    share = min(abs(value) / largest, 1.0)
    end = MORE if value > 0 else LESS
    return "#" + "".join(f"{round(255 + (part - 255) * share):02x}" for part in end)


def check_result(result: Any, kind: type, maker: str) -> None:
    """Raise a TypeError where a picture is asked for of what another function returned."""
    if not isinstance(result, kind):
        raise TypeError(
            f"This picture needs what {maker} of `keras_gemma.scoring` returns, "
            f"`{kind.__name__}`. Received: {result!r:.80} of type {type(result).__name__}"
        )


def color_surprisal(scores: TokenScores) -> ColoredTokens:
    """The text of `score_tokens`, the more orange the more a token surprised."""
    check_result(scores, TokenScores, "`score_tokens`")
    title = f"Surprisal of each token (perplexity {scores.perplexity:.2f})"
    return ColoredTokens(scores.tokens, scores.surprisal, title, "bits")


def color_attribution(shares: Attribution) -> ColoredTokens:
    """The prompt of an attribution: orange tokens speak for the answer, blue ones against it."""
    check_result(shares, Attribution, ATTRIBUTIONS)
    title = f"What speaks for {shares.answer!r} as the next token ({shares.method})"
    return ColoredTokens(shares.tokens, shares.scores, title, "nats")
