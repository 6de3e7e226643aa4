"""The base of metrics with a number for every text and layer (and head), and the tables made from these numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from phaselens.plugin import TOO_FEW_TEXTS, Column, Metric, Params, Table, TableSpec
from phaselens_plugins._common import (
    HEAD,
    LAYER,
    N_TOKENS,
    TEXT,
    head_exists,
    interval_columns,
    mean_intervals,
    mean_over_heads,
    mean_over_texts,
    null_means,
    quoted_ids,
    repeated_over_heads,
    rows_by_head,
    rows_by_index,
    rows_by_text,
)

if TYPE_CHECKING:
    import numpy as np

P = TypeVar("P", bound=Params)

#: Codes for the reason why a text has no value in a layer, stored by text and layer under `problem`.
NO_PROBLEM, SHORT, NOT_FINITE, ZERO, UNSEEN = 0, 1, 2, 3, 4
_REASONS = {
    SHORT: "fewer than two tokens",
    NOT_FINITE: "activations are NaN or infinite",
    ZERO: "activations are all zero",
    UNSEEN: "with a window of 1, no query but the first sees position 0",
}


@dataclass(frozen=True)
class Quantity:
    """A number that every text has in every layer (or head). `null` describes its null value, if it has one."""

    name: str
    unit: str
    help: str
    null: str = ""

    @property
    def stored_names(self) -> list[str]:
        """Names under which the values, and the null values if any, are stored."""
        return [self.name, f"{self.name}_null"] if self.null else [self.name]


class LayerMetric(Metric[P]):
    """Base of metrics whose values are [text, layer] or [text, layer, head].

    Subclasses list their `quantities` and store each in `per_text` under its name, its null values under `{name}_null`,
    and a code under `problem`; `compute` puts values that follow from stored ones into `derived`. The tables `texts`,
    `heads` and `layers` are made from these.
    """

    quantities: ClassVar[tuple[Quantity, ...]] = ()

    def setup(self) -> None:
        """Start with no derived values."""
        self.derived: dict[str, np.ndarray] = {}

    def values(self, name: str) -> np.ndarray:
        """Return the values of a quantity, [text, layer] or [text, layer, head], NaN where missing."""
        values: np.ndarray = self.derived[name] if name in self.derived else self.per_text.stack(name)
        return values

    def texts_table(self) -> Table:
        """Return the table `texts`: one row per text and layer (and head, if a quantity has heads)."""
        columns = [self.values(name) for quantity in self.quantities for name in quantity.stored_names]
        return self.table("texts", rows_by_text(self, columns))

    def layers_table(self) -> Table:
        """Return the table `layers`: means over texts (and heads), with intervals and nulls."""
        return self.table("layers", rows_by_index(self._means(average_heads=True)))

    def heads_table(self) -> Table:
        """Return the table `heads`: means over texts, by layer and head."""
        return self.table("heads", rows_by_head(self, self._means()))

    def _means(self, *, average_heads: bool = False) -> list[Any]:
        """Return mean, low, high and null (if any) of each quantity, each [layer] or [layer, head]; None if missing."""
        import numpy as np

        arrays = [self.values(quantity.name) for quantity in self.quantities]
        shape = max((array.shape for array in arrays), key=len)
        null_arrays = [
            self.values(f"{quantity.name}_null") if quantity.null else np.full(shape, np.nan)
            for quantity in self.quantities
        ]
        measured = np.stack([repeated_over_heads(array, shape) for array in arrays], 1)
        nulls = np.stack([repeated_over_heads(array, shape) for array in null_arrays], 1)
        if average_heads and len(shape) == 3:
            measured, nulls = mean_over_heads(self, measured), mean_over_heads(self, nulls)
        interval = mean_intervals(self, measured)
        means_of_nulls = null_means(self, nulls, where=~np.isnan(measured))
        columns = []
        for index, quantity in enumerate(self.quantities):
            columns += [bound[index] for bound in interval]
            columns += [means_of_nulls[index]] if quantity.null else []
        return columns

    def mean_by_layer(self, name: str) -> np.ndarray:
        """Return the mean over texts (and heads) [layer]; NaN where no text has a value."""
        values = self.values(name)
        return mean_over_texts(mean_over_heads(self, values) if values.ndim == 3 else values)

    def n_texts(self, name: str) -> int:
        """Return the number of texts that have a value in every layer that any text has one in."""
        import numpy as np

        values = self.values(name)
        is_present = ~np.isnan(values)
        if values.ndim == 3:
            is_present |= ~head_exists(self, values.shape[1:])
        return int(is_present[:, self._measured_layers()].reshape(len(values), -1).all(1).sum())

    def _measured_layers(self) -> list[int]:
        """Return the layers that have values; the model may lack the activations in others."""
        return self.per_text.layers("problem")

    def explain(self, name: str) -> None:
        """Warn of every reason for which the quantity `name` is missing for a text in a layer."""
        import numpy as np

        codes = self.values("problem")[:, self._measured_layers()]
        for code, reason in _REASONS.items():
            matches = codes == code
            if not matches.any():
                continue
            layers = np.array(self._measured_layers())[np.flatnonzero(matches.any(0))]
            in_layers = "" if len(layers) == matches.shape[1] else f" in layer {', '.join(map(str, layers))}"
            ids = quoted_ids(self.per_text.texts, matches.any(1))
            self.warn(f"{name} is missing: {reason}{in_layers} for text {ids}")
        if 0 < (codes == NO_PROBLEM).all(1).sum() < 2:
            self.warn("fewer than 2 texts with values: intervals are missing", TOO_FEW_TEXTS)


def missing_record(quantities: Sequence[Quantity], problem: int) -> dict[str, float]:
    """Record of a text without values in a layer: NaN for every quantity, and the problem's code."""
    names = (name for quantity in quantities for name in quantity.stored_names)
    return dict.fromkeys(names, float("nan")) | {"problem": problem}


def layer_tables(quantities: Sequence[Quantity], *, heads: bool = False) -> tuple[TableSpec, ...]:
    """Return the specs of the tables `texts`, `layers` and (with `heads`) `heads` for these quantities."""
    axes = (LAYER, HEAD) if heads else (LAYER,)
    text_columns, mean_columns = tuple(_text_columns(quantities)), tuple(_mean_columns(quantities))
    by_head = TableSpec("heads", (*axes, *mean_columns), "one row per layer and head: means over texts")
    return (
        TableSpec(
            "texts",
            (TEXT, *axes, *text_columns, N_TOKENS),
            f"one row per text{', layer and head' if heads else ' and layer'}",
        ),
        TableSpec(
            "layers",
            (LAYER, *mean_columns),
            f"one row per layer: means over {'texts and heads' if heads else 'texts'}",
        ),
        *((by_head,) if heads else ()),
    )


def _prefixed(quantities: Sequence[Quantity]) -> Iterator[tuple[Quantity, str]]:
    """Yield each quantity and the prefix of its columns; the first one's are plain `ci_low`, `ci_high`, `null`."""
    for index, quantity in enumerate(quantities):
        yield quantity, f"{quantity.name}_" if index else ""


def _text_columns(quantities: Sequence[Quantity]) -> Iterator[Column]:
    for quantity, prefix in _prefixed(quantities):
        yield Column(quantity.name, float, quantity.unit, quantity.help)
        if quantity.null:
            yield Column(f"{prefix}null", float, quantity.unit, quantity.null)


def _mean_columns(quantities: Sequence[Quantity]) -> Iterator[Column]:
    for quantity, prefix in _prefixed(quantities):
        yield Column(quantity.name, float, quantity.unit, quantity.help)
        yield from interval_columns(quantity.unit, *(f"{prefix or 'ci_'}{end}" for end in ("low", "high")))
        if quantity.null:
            yield Column(f"{prefix}null", float, quantity.unit, quantity.null)
