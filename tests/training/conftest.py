"""A tokenizer whose vocabulary has turns, and models that train in a second."""

import pytest

from keras_gemma.text.tokenizer import GemmaTokenizer


@pytest.fixture(scope="session")
def tokenizer(tiny_proto):
    return GemmaTokenizer(tiny_proto)
