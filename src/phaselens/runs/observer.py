"""The interface through which a run reports its progress."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from phaselens.runs.planning import ModelPlan


class Observer:
    """Base class of progress displays; this one ignores all reports."""

    #: Whether the run measures one batch of a model beforehand, to report what a long run will take.
    wants_plans: bool = False

    def planned(self, plan: ModelPlan) -> None:
        """Report what a model will take, if that is long."""

    def loading(self, label: str) -> None:
        """Report that a model is about to be loaded."""

    def measuring(self, label: str, n_tokens: int) -> None:
        """Report that a model is about to read `n_tokens` tokens."""

    def reading(self, n_tokens: float) -> None:
        """Report how much of the running batch the model has read, by its layers: as many tokens' worth.

        `advance` follows with the whole batch.
        """

    def advance(self, n_tokens: int) -> None:
        """Report that the model has read `n_tokens` more tokens."""
