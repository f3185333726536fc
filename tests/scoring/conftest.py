"""The conditions of all tests of scoring."""

from tests.generation.models import quick

__all__ = ["quick"]
