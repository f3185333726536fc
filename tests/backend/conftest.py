"""Compiles the kernels as they are compiled for users."""

import pytest


@pytest.fixture(scope="module")
def quick() -> None:
    """Overrides the quick compilation of the other tests."""
