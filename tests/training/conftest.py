"""Fixtures of all training tests."""

import pytest

from keras_gemma.text.tokenizer import GemmaTokenizer


@pytest.fixture(scope="session")
def tokenizer(tiny_proto):
    return GemmaTokenizer(tiny_proto)
