"""The conditions of all tests of scoring."""

from tests.models import quick

__all__ = ["quick"]
