"""Shared greedy model with a tokenizer."""

import pytest

from tests.models import make_lm, quick

__all__ = ["lm", "quick"]


@pytest.fixture(scope="module")
def lm(tiny_proto):
    return make_lm(proto=tiny_proto, sequence_length=64)
