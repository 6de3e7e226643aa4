"""What the tasks share: prompts of their own under other metrics' conditions, and shares of prompts with intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from phaselens.plugin import BASELINE, CausalMetric, Condition, LayerView, Metric, Params
from phaselens_plugins._inner import Inner, parse

if TYPE_CHECKING:
    import numpy as np

P = TypeVar("P", bound=Params)
Key = tuple[str, int | None, int | None]


class Task(CausalMetric[P]):
    """A causal metric on prompts of its own. What is done to the model comes from the metrics in `params.conditions`.

    Those see the run's texts, as they do by themselves, and so find their layers and dimensions on other text than
    the prompts.
    """

    def setup(self) -> None:
        """The inner metrics."""
        self.inner = Inner(parse(getattr(self.params, "conditions", "")), self.model, self.seed)

    @property
    def sink_position(self) -> int:
        """That of the inner metrics."""
        return self.inner.sink_position

    @property
    def n_distances(self) -> int:
        """That of the inner metrics."""
        return self.inner.n_distances

    def hooks(self) -> Sequence[str]:
        """What the inner metrics read."""
        return self.inner.hooks()

    def update(self, layer: LayerView) -> None:
        """Handed on."""
        self.inner.update(layer)

    def conditions(self) -> Sequence[Condition]:
        """All of the inner metrics' conditions."""
        found = list(self.inner.conditions())
        for warning in self.inner.warnings:
            self.warn(warning)
        return found

    def merge(self, other: Metric[P]) -> None:
        """Also the inner metrics."""
        super().merge(other)
        if isinstance(other, Task):
            self.inner.merge(other.inner)

    def groups(self) -> Iterator[tuple[str, int | None, list[Condition]]]:
        """Name and layer of the baseline and of each condition, with its repeats; without, where one did nothing."""
        working = {condition.key for condition in self.losses.working}
        named: dict[tuple[str, int | None], list[Condition]] = {}
        for condition in self.losses.conditions.values():
            named.setdefault((condition.name, condition.layer), []).append(condition)
        yield BASELINE.name, None, [BASELINE]
        for (name, layer), repeats in named.items():
            yield name, layer, repeats if all(one.key in working for one in repeats) else []


def share(values: Sequence[float], n_asked: int) -> tuple[float | None, float | None, float | None]:
    """Sum of `values`, each 0 to 1, over all `n_asked` items, with Wilson's 95 % interval; None without any value.

    An item without a value counts, as not right. Where repeats of a control were averaged, items have values between
    0 and 1: the interval then reaches from that of the next lower whole number of right ones to that of the next
    higher.

    >>> [round(each, 3) for each in share([1.0, 0.0, 1.0], 4)]
    [0.5, 0.15, 0.85]
    >>> share([], 4)
    (None, None, None)
    """
    from phaselens.uncertainty import wilson_interval

    if not len(values):
        return None, None, None
    right = math.fsum(values)
    low, high = wilson_interval(math.floor(right), n_asked), wilson_interval(math.ceil(right), n_asked)
    return right / n_asked, low.ci_low, high.ci_high


def mean(values: Iterable[float], seed: int) -> tuple[float | None, float | None, float | None]:
    """Mean of the finite values with its bootstrap interval over them; None where there is none (or too few)."""
    from phaselens.uncertainty import mean_interval

    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return None, None, None
    centre, low, high = (each.tolist() for each in mean_interval(finite, seed=seed))
    return centre, low, high


def change(values: Sequence[float], seed: int) -> tuple[float | None, float | None, float | None]:
    """As `mean`, for differences of right and wrong: no interval where all are equal, as every resample is then the
    same, however few items there are."""
    found = mean(values, seed)
    return found if len(set(values)) > 1 else (found[0], None, None)


def centre(values: Iterable[float | None]) -> float | None:
    """Mean of those that are there; None where none is."""
    there = known(values)
    return math.fsum(there) / len(there) if there else None


def average(rows: Sequence[Sequence[float | None]]) -> list[float | None]:
    """[repeat][item] → mean over repeats of each item; None where one of them has no value."""
    found: list[float | None] = []
    for column in zip(*rows, strict=True):
        known = [value for value in column if value is not None]
        found.append(sum(known) / len(known) if known and len(known) == len(column) else None)
    return found


def known(values: Iterable[float | None]) -> list[float]:
    """Those that are there."""
    return [value for value in values if value is not None]


def finite(loss: np.ndarray) -> bool:
    """Whether every token has a loss."""
    import numpy as np

    return bool(np.isfinite(loss).all())


def label(condition: str, layer: int | None) -> str:
    """A condition's name with its layer."""
    return condition if layer is None else f"{condition} (layer {layer})"
