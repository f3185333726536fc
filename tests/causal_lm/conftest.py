"""Shared model for tests that do not change its weights."""

import pytest

from tests.models import make_lm


@pytest.fixture(scope="module")
def lm(tiny_proto):
    """Model with a tokenizer."""
    return make_lm(proto=tiny_proto)
