"""The interface through which a run reports its progress."""

from __future__ import annotations


class Observer:
    """Base class of progress displays; this one ignores all reports."""

    def loading(self, label: str) -> None:
        """Report that a model is about to be loaded."""

    def measuring(self, label: str, n_tokens: int) -> None:
        """Report that a model is about to read `n_tokens` tokens."""

    def advance(self, n_tokens: int) -> None:
        """Report that the model has read `n_tokens` more tokens."""
