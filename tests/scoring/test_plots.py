"""Plots: labels of their axes, and saving; colored texts as HTML."""

import io
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from keras_gemma import scoring
from keras_gemma.scoring import plots
from keras_gemma.scoring.coloring import LESS, MORE, color

TOKENS = ["<bos>", "To", "▁be", "$x$", "\n", "a_very_long_piece_of_text"]
LABELS = ["<bos>", "To", "▁be", r"\$x\$", "↵", "a_very_long…"]

SCORES = scoring.TokenScores(TOKENS, np.arange(6), np.array([np.nan, -1.0, -2.0, -0.5, -3.0, -1.5]))
SHARES = scoring.Attribution(
    TOKENS, "▁be", "integrated gradients", np.array([0.0, 1.0, -2.0, 0.5, 0.1, -0.1]), -1.0, -3.0
)
LENS = scoring.LogitLens(
    TOKENS,
    ["embeddings", "block 0", "block 1"],
    [TOKENS] * 3,
    np.linspace(0, 1, 18).reshape(3, 6),
    np.ones((3, 5)),
)
MAPS = scoring.AttentionMaps(TOKENS, 3, np.tril(np.ones((5, 6, 6))) / 6)
GRID = scoring.Patching(
    TOKENS,
    ["<bos>", "To", "▁die", *TOKENS[3:]],
    "▁be",
    "residual.after",
    np.linspace(-4, -1, 12).reshape(2, 6),
    -1.0,
    -4.0,
)

PLOTS = {
    "surprisal": (plots.surprisal, SCORES, ["perplexity"], "surprisal (bits)"),
    "attribution": (plots.attribution, SHARES, ["integrated gradients", "▁be"], "log p (nats)"),
    "logit_lens": (plots.logit_lens, LENS, ["next token"], "residual after"),
    "attention": (plots.attention, MAPS, ["block 3"], "query"),
    "patching": (plots.patching, GRID, ["▁be", "residual.after"], "block"),
}


def texts(axes):
    return [text.get_text() for text in axes.get_xticklabels()]


@pytest.fixture
def pyplot(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    return pytest.importorskip("matplotlib.pyplot")


@pytest.mark.parametrize("name", PLOTS)
def test_plots(name, pyplot):
    draw, result, title_words, y_label = PLOTS[name]
    figure = draw(result)
    assert not pyplot.get_fignums()  # closed, so that a notebook shows it once
    first = figure.axes[0]
    title = figure.get_suptitle() or first.get_title()
    assert all(word in title for word in title_words)
    assert y_label in first.get_ylabel()
    ticked = [axes for axes in figure.axes if len(texts(axes)) == len(TOKENS)]
    assert ticked and all(axes.get_xlabel() for axes in ticked)
    expected = LABELS if name != "patching" else [*LABELS[:2], "▁die → ▁be", *LABELS[3:5]]
    assert texts(ticked[0])[: len(expected)] == expected
    if name in ("logit_lens", "attention", "patching"):
        bar = figure.axes[-1].get_ylabel()
        assert bar and any(word in bar for word in ("probability", "weight", "%"))
    for kind in ("png", "svg"):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind)
        assert len(buffer.getvalue()) > 1000


def test_attention_plot_of_chosen_heads(pyplot):
    figure = plots.attention(MAPS, heads=[4, 1])
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == ["head 4", "head 1"]
    for heads in ([5], [-1], [], [0.0], [True], 3, "0"):
        with pytest.raises(ValueError, match=rf"in \[0, 4\].*heads={re.escape(repr(heads))}"):
            plots.attention(MAPS, heads=heads)


def test_wrong_result_types_raise():
    """Types are checked before matplotlib is imported."""
    draws = [(draw, result) for draw, result, *_ in PLOTS.values()]
    draws += [(plots.color_surprisal, SCORES), (plots.color_attribution, SHARES)]
    for draw, result in draws:
        other = MAPS if result is not MAPS else GRID
        with pytest.raises(TypeError, match=f"must be a `{type(result).__name__}`.*Received"):
            draw(other)


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "\.\[plots\]"'):
        plots.surprisal(SCORES)


class Reader(HTMLParser):
    """Parser that collects the text of a page, and the tooltip and style of each token."""

    def __init__(self, page):
        super().__init__()
        self.text, self.tips, self.open = "", [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag != "br":
            self.open.append(tag)
        if "title" in attributes:
            self.tips.append((attributes["title"], attributes["style"]))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_colored_tokens():
    tokens = ["<script>alert('x')</script>", "▁&amp", '"', "\n"]
    colored = scoring.ColoredTokens(tokens, [2.0, -1.0, np.nan, 0.0], "a < b", "nats & bits")
    page = colored._repr_html_()
    assert "<script" not in page and page == str(colored)
    read = Reader(page)
    assert not read.open
    assert "".join(tokens).replace("▁", " ").replace("\n", "↵") in read.text
    assert "a < b" in read.text and "nats & bits" in read.text
    tips, styles = zip(*read.tips, strict=True)
    assert tips[0] == "<script>alert('x')</script>: 2.000 nats & bits"
    assert tips[2].endswith("not measured")
    assert styles == tuple(
        f"background:{color(v, 2.0)};margin-right:1px" for v in (2.0, -1.0, np.nan, 0.0)
    )


def test_colors():
    assert color(3.0, 3.0) == "#{:02x}{:02x}{:02x}".format(*MORE)
    assert color(-3.0, 3.0) == "#{:02x}{:02x}{:02x}".format(*LESS)
    assert color(0.0, 3.0) == color(float("nan"), 3.0) == color(0.0, 0.0) == "#ffffff"
    for end in (MORE, LESS):  # contrast with black text, by WCAG
        linear = [((c / 255 + 0.055) / 1.055) ** 2.4 for c in end]
        luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        assert (luminance + 0.05) / 0.05 > 7


def test_color_functions():
    surprisal = plots.color_surprisal(SCORES)
    assert surprisal.unit == "bits" and "perplexity" in surprisal.title
    np.testing.assert_array_equal(surprisal.values, SCORES.surprisal)
    attribution = plots.color_attribution(SHARES)
    assert attribution.unit == "nats" and "'▁be'" in attribution.title
    with pytest.raises(ValueError, match="2 values, 1 tokens"):
        scoring.ColoredTokens(["a"], [1, 2], "", "")
