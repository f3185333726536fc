"""Status lines: shown in a terminal only, and until something else is printed."""

import sys

import pytest

from keras_gemma import progress
from tests.cli.process import Terminal

pytestmark = pytest.mark.once


@pytest.fixture
def make_terminal(monkeypatch):
    """Function that makes a terminal of stderr. Called by the test, because pytest sets stderr."""

    def make():
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr(sys, "stderr", Terminal())
        return sys.stderr

    return make


def test_status_in_a_terminal(make_terminal):
    terminal = make_terminal()
    with progress.status("Loading ..."):
        assert "Loading ..." in terminal.getvalue()
        progress.end_status()
        print("a remark", file=terminal)
        end = len(terminal.getvalue())
    assert terminal.getvalue()[:end].endswith("a remark\n")
    assert "Loading" not in terminal.getvalue()[end:]


def test_later_status_and_bar_end_the_earlier_status(make_terminal, monkeypatch):
    make_terminal()
    monkeypatch.setattr(progress, "PATIENCE", -1)
    with progress.status("Starting ..."):
        (first,) = progress._statuses
        with progress.status("Loading ..."):
            assert not first.is_started
            second = progress._statuses[-1]
            with progress.bar("weights", 2) as advance:
                assert second.is_started
                advance(1)
                assert not second.is_started
    assert progress._statuses == []


def test_no_status_in_a_pipe_or_if_hidden(make_terminal, monkeypatch):
    terminal = make_terminal()
    with progress.hidden(), progress.status("Loading ..."):
        pass
    assert terminal.getvalue() == ""
    monkeypatch.setattr(terminal, "isatty", lambda: False)
    with progress.status("Loading ..."):
        pass
    assert terminal.getvalue() == ""


def test_status_until_first(make_terminal):
    terminal = make_terminal()
    shown = []
    for item in progress.status_until_first("Thinking ...", iter("abc")):
        shown.append(item)
        assert progress._statuses == []
    assert shown == list("abc") and "Thinking ..." in terminal.getvalue()
    assert list(progress.status_until_first("Thinking ...", [])) == []
