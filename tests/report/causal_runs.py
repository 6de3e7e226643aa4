"""Runs of causal metrics made by hand, for tests of their tables and figures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from phaselens.plugin import (
    CAUSAL_TABLES,
    CausalMetric,
    Column,
    Condition,
    Display,
    TableSpec,
    with_adjusted_p,
)
from phaselens.runs import MetricResult, ModelRecord, Run, TextRecord
from tests.toys import toy_info


class Effects(CausalMetric[Any]):
    """A metric with the display and the tables of every causal metric."""

    name, version, title = "effects", "1", "effects of conditions"

    def conditions(self) -> list[Condition]:
        raise AssertionError("made by hand")


class Shares(Effects):
    """A display of another table, in percent."""

    tables: ClassVar[tuple[TableSpec, ...]] = (
        *CAUSAL_TABLES,
        TableSpec(
            "accuracy",
            (
                Column("condition", str),
                Column("layer", int, "index"),
                Column("right", float, "share of items"),
                Column("low", float, "share of items"),
                Column("high", float, "share of items"),
                Column("chance", float, "share of items"),
                Column("gain", float, "nats"),
                Column("n", int, "items"),
            ),
        ),
        TableSpec("summary", (Column("best", float, "share of items"), Column("n_ctx", int, "tokens"))),
    )
    display = Display(
        table="accuracy", rows="condition", value="right", title="right", low="low", high="high", null="chance",
        percent=True, also=(("gain", "gain"), ("n", "n")), summary=(("best", "best"), ("n_ctx", "n_ctx")),
    )  # fmt: skip


def baseline(ppl: float = 54.2309, n_texts: int = 16) -> tuple[Any, ...]:
    """Return the row of the unedited model."""
    return ("baseline", None, None, ppl, *(None,) * 5, n_texts, *(None,) * 4, 621, 1, ppl, None)


def condition(
    name: str, layer: int | None, ratio: float | None, low: float | None = None, high: float | None = None, *,
    delta: tuple[float | None, float | None, float | None] = (None, None, None), p_value: float | None = 0.5,
) -> tuple[Any, ...]:  # fmt: skip
    """Return a row of the table `conditions`; `delta` is the difference in nats with its interval."""
    ppl = None if ratio is None else 54.2309 * ratio
    return (
        name, layer, None, ppl, ratio, low, high, delta[0], p_value if ratio is not None else None, 16, delta[1],
        delta[2], None, None, 621, 1, ppl, ratio,
    )  # fmt: skip


def contrast(
    name: str, control: str, layer: int | None, delta: float, low: float, high: float, p_value: float
) -> tuple[Any, ...]:
    """Return a row of the table `contrasts`."""
    return (name, control, layer, None, delta, low, high, p_value, 1.5, 16, 3)


def causal_run(
    tables: dict[str, dict[str, list[tuple[Any, ...]]]], metric: type[Effects] = Effects, **info: Any
) -> Run:
    """Return a run with these rows by model and table."""
    result = MetricResult(metric, metric.Params(), "phaselens 1")
    models = []
    for label, rows_by_table in tables.items():
        facts = replace(toy_info(n_layers=6, label=label), **info)
        models.append(ModelRecord(facts, "auto", 0, True, 637))
        for name, rows in rows_by_table.items():
            if name in ("conditions", "contrasts"):
                rows = with_adjusted_p(rows, metric.spec(name).index("p_value"))
            result.add(label, name, metric.table(name, rows), {})
    texts = [TextRecord(f"t{index}", "00", dict.fromkeys(tables, 4)) for index in range(60)]
    return Run(models, texts, {metric.name: result}, [], {"seed": 0}, {"phaselens": "1"})


def two_models() -> Run:
    """Return a run in which a condition's effect exceeds its control's in the first model only."""
    write_layer, other_position = "write layer", "other position: write layer"
    rope = [
        baseline(),
        condition(write_layer, 1, 1.1488, 1.1116, 1.1887, delta=(0.1387, 0.1058, 0.1728), p_value=0.00024),
        condition(other_position, 1, 1.0003, 0.9995, 1.0011, delta=(0.0003, -0.0005, 0.0011), p_value=0.346),
    ]
    drope = [
        baseline(62.6375),
        condition(write_layer, 5, 1815.2, 1602.4, 2031.9, delta=(7.504, 7.379, 7.617), p_value=0.00024),
        condition(other_position, 5, 1.0, 1.0, 1.0, delta=(0.0, 0.0, 0.0), p_value=1.0),
        condition("below the last", 0, 1e6, 9e5, 1.1e6, delta=(13.8, 13.7, 13.9), p_value=0.0312),
        condition("other position: below the last", 0, None),
    ]
    differences = {
        "rope": [contrast(write_layer, other_position, 1, 0.1384, 0.1052, 0.1725, 0.0003)],
        "drope": [contrast(write_layer, other_position, 5, -0.0006, -0.0124, 0.0124, 0.929)],
    }
    return causal_run(
        {
            "rope": {"conditions": rope, "contrasts": differences["rope"]},
            "drope": {"conditions": drope, "contrasts": differences["drope"]},
        }
    )


def sweep(n_layers: dict[str, int], *, control: bool = True) -> Run:
    """Return a run of one condition in every layer, with its control in between."""
    tables = {}
    for label, n in n_layers.items():
        rows, differences = [baseline()], []
        for layer in range(n):
            delta = 0.1 * layer + 0.002
            rows.append(
                condition("MLP off", layer, 1 + delta, 1.0, 2.0, delta=(delta, delta - 0.001, delta + 0.1))
            )
            if control:
                rows.append(condition("MLP off elsewhere", layer, 1.001, 0.9, 1.1, delta=(0.001, -0.1, 0.1)))
                differences.append(contrast("MLP off", "MLP off elsewhere", layer, delta, 0.0, 1.0, 0.5))
        tables[label] = {"conditions": rows, "contrasts": differences}
    return causal_run(tables)


def shares() -> Run:
    """Return a run with a display of shares, with a null and a summary."""
    rows = {
        "rope": [("baseline, 64 tokens", None, 0.75, 0.5, 0.9, 0.01, 2.19, 20)],
        "drope": [("baseline, 64 tokens", None, None, None, None, 0.01, None, 20)],
    }
    return causal_run(
        {
            label: {"conditions": [baseline(n_texts=20)], "accuracy": accuracy, "summary": [(0.625, 2048)]}
            for label, accuracy in rows.items()
        },
        Shares,
    )
