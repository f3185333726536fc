"""Fixtures of the tests that run commands in this process."""

import sys

import pytest

from tests.cli.process import Terminal


@pytest.fixture
def terminal():
    return Terminal()


@pytest.fixture(autouse=True)
def unchanged_process(monkeypatch):
    """Undoes what a command changes in the process."""
    monkeypatch.setattr("sys.excepthook", sys.excepthook)
    monkeypatch.setattr("keras_gemma.cli.options.silence_frameworks", lambda: None)
