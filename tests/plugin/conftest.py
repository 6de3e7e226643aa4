"""The fixture `install` for the tests in this folder."""

from tests.distributions import install

__all__ = ["install"]
