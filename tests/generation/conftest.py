"""One model without text for all tests of generation."""

import pytest

from tests.models import make_lm


@pytest.fixture(scope="module")
def lm():
    """Deals in ids."""
    return make_lm()
