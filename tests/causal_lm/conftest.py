"""Shared model for tests that do not change its weights."""

import pytest

from tests.models import compile_lm, make_lm


@pytest.fixture(scope="session")
def session_lm(tiny_proto):
    return make_lm(proto=tiny_proto)


@pytest.fixture(scope="module")
def lm(session_lm):
    """Model with a tokenizer. All modules share its programs."""
    compile_lm(session_lm)
    return session_lm
