"""A small vocabulary, trained once, and a tokenizer of it."""

import pytest

from keras_gemma.text import GemmaTokenizer, train_vocabulary
from tests.text.texts import CORPUS


@pytest.fixture(scope="session")
def proto():
    return train_vocabulary(CORPUS, 440)


@pytest.fixture
def tokenizer(proto):
    return GemmaTokenizer(proto)
