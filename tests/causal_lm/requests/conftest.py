"""Shared greedy model with a tokenizer."""

import pytest

from tests.models import make_lm


@pytest.fixture(scope="session")
def session_lm(tiny_proto):
    return make_lm(proto=tiny_proto, sequence_length=64)
