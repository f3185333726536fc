"""Fixtures of the tests of generation."""

import pytest

from tests.models import make_lm


@pytest.fixture(scope="module")
def lm():
    """A model without a preprocessor: ids in, ids out."""
    return make_lm()
