"""Fixtures of all scoring tests."""

from tests.models import quick

__all__ = ["quick"]
