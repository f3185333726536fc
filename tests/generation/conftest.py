"""Fixtures of the tests of generation."""

import pytest

from tests.models import compile_lm, make_lm


@pytest.fixture(scope="session")
def session_lm():
    return make_lm()


@pytest.fixture(scope="module")
def lm(session_lm):
    """A model without a preprocessor: ids in, ids out. All modules share its programs."""
    compile_lm(session_lm)
    return session_lm
