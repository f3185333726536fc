"""Text of a model: control characters are removed in a terminal, and kept in a pipe."""

import io
import sys
from types import SimpleNamespace

import pytest

from keras_gemma.cli.chat import answer
from keras_gemma.cli.generate import print_texts
from keras_gemma.cli.printing import show
from keras_gemma.cli.speed import Watch
from keras_gemma.cli.terminal import Terminal

EVIL = "a\x1b[2J\x1b]0;title\x07\tb\r\x9b31m\x08\x7f\nc ❧ é"
HARMLESS = "a[2J]0;title\tb31m\nc ❧ é"

EXPECTED = pytest.mark.parametrize(
    ("terminal", "expected"), [(True, HARMLESS), (False, EVIL)], ids=["terminal", "pipe"]
)


def output(monkeypatch, terminal):
    """Replaces standard output with a terminal or a pipe, and returns it."""
    out = io.StringIO()
    out.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stdout", out)
    return out


class Chat(SimpleNamespace):
    def stream(self, text):
        yield from text


@EXPECTED
def test_show(terminal, expected, monkeypatch):
    out = output(monkeypatch, terminal)
    show(EVIL)
    assert out.getvalue() == expected + "\n"


@EXPECTED
def test_generated_text(terminal, expected, monkeypatch):
    out = output(monkeypatch, terminal)
    tokenizer = SimpleNamespace(encode=lambda texts: texts)
    lm = SimpleNamespace(
        stream=lambda texts, **_: ([character] for character in EVIL),
        preprocessor=SimpleNamespace(tokenizer=tokenizer),
    )
    assert print_texts(lm, [EVIL], {}, False, Watch()) == (len(EVIL), [])
    assert out.getvalue() == 2 * expected + "\n"


@EXPECTED
def test_reply(terminal, expected, monkeypatch):
    out = output(monkeypatch, terminal)
    answer(Chat(), EVIL, "tiny", as_json=False, benchmark=False)
    assert out.getvalue() == expected + "\n"


@EXPECTED
def test_conversation(terminal, expected, monkeypatch):
    out = output(monkeypatch, terminal)
    chat = Chat(
        settings={}, dropped=[], finish_reason="stop", messages=[{"role": "user", "content": EVIL}]
    )
    conversation = Terminal(chat, "tiny", silent=True)
    conversation.reply(EVIL)
    assert out.getvalue() == expected + "\n"
    monkeypatch.setenv("COLUMNS", "200")
    conversation.history("")
    assert not {"\x07", "\x08", "\x7f", "\x9b"} & set(out.getvalue()[len(expected) + 1 :])
