"""One model with text for all tests of the task that leave its weights alone."""

import pytest

from tests.models import make_lm, quick

__all__ = ["lm", "quick"]


@pytest.fixture(scope="module")
def lm(tiny_proto):
    """Deals in text."""
    return make_lm(proto=tiny_proto)
