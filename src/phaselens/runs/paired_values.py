"""The values of a metric's tables by text, keyed by what two models have in common: condition, group and layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from phaselens.plugin import BASELINE, CellValue, Column, Table
from phaselens.runs.result import LABEL, MetricResult

_COUNTS = ("n_tokens", "n_predicted")
_OF_BASELINE, _OVER_BASELINE = " of the baseline", " over the baseline"
#: The column of what a condition costs.
LOSS_OVER_BASELINE = f"loss{_OVER_BASELINE}"


class ValueKey(NamedTuple):
    """What distinguishes the values of one text in one column."""

    condition: str | None
    group: str | None
    layer: int | None


ValuesByText = Mapping[ValueKey, Mapping[str, float]]


@dataclass(frozen=True)
class PairedKey:
    """Two keys that are compared: equal, but for the layers of a condition that each model chose for itself."""

    first: ValueKey
    second: ValueKey

    @property
    def condition(self) -> str | None:
        return self.first.condition

    @property
    def group(self) -> str | None:
        return self.first.group

    @property
    def layer(self) -> int | None:
        """The layer that both have; None where they differ."""
        return self.first.layer if self.first.layer == self.second.layer else None

    def note(self, metric: str, labels: tuple[str, str]) -> str:
        """Return a note about layers that differ; empty if they agree."""
        if self.first.layer == self.second.layer:
            return ""
        layers = [
            f"layer {key.layer}" if key.layer is not None else "no layer" for key in (self.first, self.second)
        ]
        return f"{metric}: {self.condition} is {layers[0]} of {labels[0]} and {layers[1]} of {labels[1]}"


def values_by_text(table: Table, label: str) -> dict[Column, ValuesByText]:
    """Return one model's values of each measured column by key and text; heads and seeds of a text are averaged.

    Empty for a table that lists things instead of measuring each text. The losses of a condition are those over the
    baseline's, in nats per token.
    """
    columns = table.spec.columns
    names = [column.name for column in columns]
    if "text" not in names or not any(count in names for count in _COUNTS):
        return {}
    not_groups = ("model", "text", "condition", LABEL.name)
    groups = [column.name for column in columns if column.type is str and column.name not in not_groups]
    measured = [column for column in columns if column.type is float and not _is_null(column.name)]
    by_column: dict[Column, dict[ValueKey, dict[str, list[CellValue]]]] = {column: {} for column in measured}
    for record in table.records():
        if record["model"] != label:
            continue
        key = ValueKey(
            _text_or_none(record.get("condition")),
            ", ".join(str(record[name]) for name in groups) or None,
            _layer(record.get("layer")),
        )
        for column in measured:
            by_text = by_column[column].setdefault(key, {})
            by_text.setdefault(str(record["text"]), []).append(record[column.name])
    means: dict[Column, ValuesByText] = {column: _means(by_key) for column, by_key in by_column.items()}
    return dict(_relative_to_baseline(means)) if "condition" in names else means


def _is_null(name: str) -> bool:
    return name == "null" or name.startswith("null_") or name.endswith("_null")


def _text_or_none(value: CellValue) -> str | None:
    return None if value is None else str(value)


def _layer(value: CellValue) -> int | None:
    return value if isinstance(value, int) else None


def _means(by_key: Mapping[ValueKey, Mapping[str, list[CellValue]]]) -> dict[ValueKey, dict[str, float]]:
    """Average a text's values; a text with a missing one has none."""
    return {
        key: {
            text: sum(numbers) / len(numbers)
            for text, cells in by_text.items()
            if len(numbers := [cell for cell in cells if isinstance(cell, int | float)]) == len(cells)
        }
        for key, by_text in by_key.items()
    }


def _relative_to_baseline(
    means: Mapping[Column, ValuesByText],
) -> Iterator[tuple[Column, ValuesByText]]:
    """Yield the baseline's own values, and those of each condition less the baseline's."""
    baseline = ValueKey(BASELINE.name, None, None)
    for column, by_key in means.items():
        start = by_key.get(baseline, {})
        yield replace(column, name=f"{column.name}{_OF_BASELINE}"), {baseline: start}
        yield (
            replace(column, name=f"{column.name}{_OVER_BASELINE}"),
            {
                key: {text: value - start[text] for text, value in by_text.items() if text in start}
                for key, by_text in by_key.items()
                if key != baseline
            },
        )


def paired_keys(first: ValuesByText, second: ValuesByText) -> list[PairedKey]:
    """Return the keys that both have, in the first one's order.

    A condition with one layer in each model is paired by its name, because models differ in the layer that, for
    instance, writes the norm of BOS. Conditions with several layers are paired layer by layer.
    """
    first_singles, second_singles = _single_layers(first), _single_layers(second)
    pairs = []
    for key in first:
        name = key[:2]
        if key in second:
            pairs.append(PairedKey(key, key))
        elif key.condition is not None and name in first_singles and name in second_singles:
            pairs.append(PairedKey(key, second_singles[name]))
    return pairs


def _single_layers(values: ValuesByText) -> dict[tuple[str | None, str | None], ValueKey]:
    """Return the keys of the conditions and groups that have a single layer."""
    by_name: dict[tuple[str | None, str | None], list[ValueKey]] = {}
    for key in values:
        by_name.setdefault(key[:2], []).append(key)
    return {name: keys[0] for name, keys in by_name.items() if len(keys) == 1}


def displayed_value(result: MetricResult, columns: Sequence[str]) -> str:
    """Return the column to show: what conditions cost, else the value of the metric's display, else the first."""
    display = result.metric.display
    wanted_columns = [LOSS_OVER_BASELINE, display.value if display is not None else ""]
    return next((column for column in wanted_columns if column in columns), columns[0])
