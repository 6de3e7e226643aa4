"""Means over texts with their intervals, and the columns that hold them, for metrics of plugins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phaselens.errors import (
    InputError,
    as_numbers,
    require_flag,
    require_kind,
    require_text,
    short_form,
)
from phaselens.plugin.tables import Column, interval_help
from phaselens.plugin.warning import TOO_FEW_TEXTS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike

    from phaselens.plugin.metric import Metric


def interval_columns(unit: str, low: str = "ci_low", high: str = "ci_high") -> tuple[Column, Column]:
    """Return the columns of the two ends of an interval, as `mean_intervals` computes them.

    >>> [column.name for column in interval_columns("share")]
    ['ci_low', 'ci_high']
    """
    for name, value in (("unit", unit), ("low", low), ("high", high)):
        require_text(name, value)
    help_ = interval_help()
    return Column(low, float, unit, help_), Column(high, float, unit, help_)


def mean_intervals(
    metric: Metric[Any],
    values: ArrayLike,
    *,
    where: np.ndarray | None = None,
    n_resamples: int | None = None,
    explain: bool = True,
) -> list[Any]:
    """Return the mean over texts of many cells at once, and the two ends of its interval, as nested lists.

    Each of the three has the shape of a text's values, [layer] or [layer, head] for instance, with None where it is
    missing: the mean where no text has a value, the ends where fewer than two have. Texts are resampled in the order of
    their content (`PerText.by_content`), with the metric's seed, so that neither their order nor the batches matter.

    Args:
        metric: the metric, whose `per_text` has the texts.
        values: [text, …], in the order of `per_text`; NaN where a text has no value.
        where: [text, …], bool: which texts count; by default all that have a value.
        n_resamples: resamples of the texts; by default all of up to 8 texts, and 10,000 draws for more.
        explain: warn with the code `TOO_FEW_TEXTS` where ends are missing because only one text has a value.

    Raises:
        InputError: for values of another number of texts than `per_text` has.

    In `compute`:

        share = self.per_text.stack("share")                       # [text, layer]
        mean, low, high = mean_intervals(self, share)
        rows = [(layer, *cells) for layer, cells in enumerate(zip(mean, low, high))]
    """
    import numpy as np

    from phaselens.plugin.metric import Metric
    from phaselens.uncertainty import N_RESAMPLES, mean_interval

    require_kind("metric", metric, Metric, "the instance itself: self")
    require_flag("explain", explain)
    table = as_numbers("values", values)
    order = metric.per_text.by_content
    if table.ndim < 1 or len(table) != len(order):
        raise InputError(
            f"expected values [text, …] of the {len(order)} texts of per_text, received shape {table.shape}"
        )
    present = ~np.isnan(table)
    if where is not None:
        if getattr(where, "dtype", None) != np.dtype(bool) or where.shape != table.shape:
            raise InputError(
                f"expected where as a bool array of shape {table.shape}, received {short_form(where)}"
            )
        present &= where
    interval = mean_interval(
        table[order],
        present=present[order],
        n_resamples=N_RESAMPLES if n_resamples is None else n_resamples,
        seed=metric.seed,
    )
    if explain and (present.sum(0) == 1).any():
        metric.warn("fewer than 2 texts with values: intervals are missing", TOO_FEW_TEXTS)
    return [bound.tolist() for bound in interval]
