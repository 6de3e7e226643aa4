"""Base class of tasks, which run their own prompts under other metrics' conditions, and their statistics."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Generic, TypeAlias, TypeVar

from phaselens.plugin import (
    BASELINE,
    CausalMetric,
    Condition,
    ConditionKey,
    Display,
    LayerView,
    Metric,
    Params,
)
from phaselens_plugins._causal import merge_nested
from phaselens_plugins._encoding import PromptEncoder
from phaselens_plugins._inner import InnerMetrics, parse_sources

if TYPE_CHECKING:
    import numpy as np

#: A value and the two ends of its interval; None where undefined.
Estimate: TypeAlias = tuple[float | None, float | None, float | None]


class TaskParams(Params):
    """Parameters of a task. A subclass declares the field `conditions` after its own, so that it is listed last."""

    conditions: str

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_sources(self.conditions)

    @property
    def conditions_note(self) -> str:
        """Requested conditions, as the end of the definition; empty without any."""
        return f"; under {self.conditions}" if self.conditions.strip() else ""


P = TypeVar("P", bound=TaskParams)
S = TypeVar("S")


def task_display(
    value: str, *, columns: Sequence[tuple[str, str]], summary: Sequence[tuple[str, str]]
) -> Display:
    """Return the display of a task's accuracy: the share `value` with its interval and its level of chance.

    Args:
        value: the column of the table `accuracy` that holds the share.
        columns: further columns, each with its title.
        summary: columns of the table `summary`, each with its title.
    """
    return Display(
        table="accuracy",
        rows="condition",
        value=value,
        title=value,
        low="ci_low",
        high="ci_high",
        null="chance",
        percent=True,
        also=tuple(columns),
        summary=tuple(summary),
    )


class Task(CausalMetric[P], Generic[P, S]):
    """Base of causal metrics on their own prompts. The metrics in `params.conditions` declare the conditions.

    Those inner metrics see the run's texts, as they do in a run without the task, so they select layers and
    dimensions on other text than the prompts. `scores` has a score S by condition and by an item's id.
    """

    def setup(self) -> None:
        """Start the inner metrics and the scores."""
        self.inner = InnerMetrics(parse_sources(self.params.conditions), self.model, self.seed)
        self.scores: dict[ConditionKey, dict[str, S]] = {}

    @property
    def sink_position(self) -> int:
        """The inner metrics' sink position."""
        return self.inner.sink_position

    @property
    def n_distances(self) -> int:
        """The inner metrics' number of distances."""
        return self.inner.n_distances

    partial_layers = True  # an inner metric may need fewer points than another

    def hooks(self) -> Sequence[str]:
        """Return the inner metrics' hook points."""
        return self.inner.hooks()

    def update(self, layer: LayerView) -> None:
        """Forward the layer to the inner metrics."""
        self.inner.update(layer)

    def conditions(self) -> Sequence[Condition]:
        """Return the inner metrics' conditions."""
        conditions = list(self.inner.conditions())
        for warning in self.inner.warnings:
            self.warn(warning)
        return conditions

    def merge(self, other: Metric[P]) -> None:
        """Merge another instance, with its inner metrics and scores."""
        super().merge(other)
        if isinstance(other, Task):
            self.inner.merge(other.inner)
            merge_nested(self.scores, other.scores)

    def encoder(self, tokenizer: object) -> PromptEncoder:
        """Return the encoder of the prompts, under the run's BOS policy."""
        return PromptEncoder(tokenizer, bos=self.bos, bos_token_id=self.model.bos_token_id)

    def groups(self) -> Iterator[tuple[str, int | None, list[Condition]]]:
        """Yield name, layer and repeats of the baseline and each condition; no repeats if an edit did nothing."""
        working = {condition.key for condition in self.losses.effective_conditions}
        yield BASELINE.name, None, [BASELINE]
        for (name, layer, head), repeats in self.losses.repeats.items():
            name = name if head is None else f"{name}, head {head}"
            yield name, layer, repeats if all(repeat.key in working for repeat in repeats) else []

    def values(self, repeats: Sequence[Condition], ids: Sequence[str], field: str) -> list[float | None]:
        """Return one field of each item's score, mean over repeats; None where a repeat has no score."""
        if not repeats:
            return [None] * len(ids)
        scores_by_repeat = [self.scores.get(repeat.key, {}) for repeat in repeats]
        return mean_over_repeats(
            [
                [getattr(scores[item_id], field) if item_id in scores else None for item_id in ids]
                for scores in scores_by_repeat
            ]
        )

    def share(self, repeats: Sequence[Condition], ids: Sequence[str], field: str) -> Estimate:
        """Return the share of the items that are right by `field`, with Wilson's interval; see `share_right`."""
        return share_right(without_none(self.values(repeats, ids, field)), len(ids))

    def mean_change(self, changes: Sequence[float], note: str) -> Estimate:
        """Return the mean change of items that are right or wrong, with its bootstrap interval.

        The interval is None where all changes are equal, as every resample is then the same, however few the items;
        `note` is the warning in that case.
        """
        centre, low, high = mean_with_interval(changes, self.seed)
        if len(set(changes)) <= 1:
            low = high = None
        if centre is not None and low is None:
            self.warn(note)
        return centre, low, high


def share_right(values: Sequence[float], n_asked: int) -> Estimate:
    """Return the sum of `values`, each 0 to 1, over `n_asked` items, with Wilson's 95 % interval; None without values.

    An item without a value counts as wrong. Where repeats of a control were averaged, items have values between 0 and
    1: the interval then reaches from that of the next lower whole number of right ones to that of the next higher.

    >>> [round(number, 3) for number in share_right([1.0, 0.0, 1.0], 4)]
    [0.5, 0.15, 0.85]
    >>> share_right([], 4)
    (None, None, None)
    """
    from phaselens.uncertainty import wilson_interval

    if not len(values):
        return None, None, None
    n_right = math.fsum(values)
    lower, upper = wilson_interval(math.floor(n_right), n_asked), wilson_interval(math.ceil(n_right), n_asked)
    return n_right / n_asked, lower.ci_low, upper.ci_high


def mean_with_interval(values: Iterable[float], seed: int, *, n_resamples: int | None = None) -> Estimate:
    """Return the mean of the finite values with its bootstrap interval; None where there are none (or too few)."""
    from phaselens.uncertainty import N_RESAMPLES, mean_interval

    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return None, None, None
    centre, low, high = (
        number.tolist() for number in mean_interval(finite, n_resamples=n_resamples or N_RESAMPLES, seed=seed)
    )
    return centre, low, high


def mean_of_present(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are not None; None where there are none."""
    numbers = without_none(values)
    return math.fsum(numbers) / len(numbers) if numbers else None


def mean_over_repeats(rows: Sequence[Sequence[float | None]]) -> list[float | None]:
    """Return the mean over repeats [item] of [repeat][item]; None where a repeat has no value."""
    means: list[float | None] = []
    for column in zip(*rows, strict=True):
        numbers = without_none(column)
        means.append(sum(numbers) / len(numbers) if len(numbers) == len(column) else None)
    return means


def without_none(values: Iterable[float | None]) -> list[float]:
    """Return the values that are not None."""
    return [value for value in values if value is not None]


def complete_pairs(
    first: Iterable[float | None], second: Iterable[float | None]
) -> list[tuple[float, float]]:
    """Return the pairs of values of the same item, without the items where one of the two is None."""
    return [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]


def all_finite(loss: np.ndarray) -> bool:
    """Return whether every token has a finite loss."""
    import numpy as np

    return bool(np.isfinite(loss).all())
