"""Fixtures of all training tests."""

import pytest

from keras_gemma.text.tokenizer import GemmaTokenizer
from tests.models import quick

__all__ = ["quick"]


@pytest.fixture(scope="session")
def tokenizer(tiny_proto):
    return GemmaTokenizer(tiny_proto)
