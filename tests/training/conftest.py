"""A tokenizer whose vocabulary has turns, and models that train in a second."""

import pytest

from keras_gemma.text.tokenizer import GemmaTokenizer
from tests.models import quick

__all__ = ["quick"]


@pytest.fixture(scope="session")
def tokenizer(tiny_proto):
    return GemmaTokenizer(tiny_proto)
