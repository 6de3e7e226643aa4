"""Print the tables of docs/real-model.md from stored runs: `python -m tools.recalibrate.findings DIR …`.

The runs are those of the commands on that page. A model may be in several of them, with different metrics.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tools.train_pair.measure import TAU

import phaselens
from phaselens.uncertainty import mean_interval

Row = dict[str, Any]
#: Layers that behave alike in SmolLM2-135M, first and last.
BANDS = ((0, 2), (3, 9), (10, 11), (12, 29))
#: Conditions of each causal metric, in the order of the table, with the words for them.
CONDITIONS = {
    "bos-mlp": {
        "write layer": "BOS-MLP removed at the layer that writes it",
        "other position: write layer": "control: another position of each text",
        "write layer below the last": "the same at the write layer below the last",
    },
    "bos-v": {
        "all layers": "values of BOS removed, all layers",
        "other position: all layers": "control: another position",
    },
    "qk-disruption": {
        "massive": "massive cells of Q and K overwritten",
        "random-count": "control: as many random cells",
        "random-norm": "control: random cells of the same norm",
    },
}


class StoredRuns:
    """The tables of several runs, by model."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.runs = [phaselens.open_run(folder) for folder in folders]

    def rows(self, metric: str, table: str) -> Iterator[Row]:
        """Yield the rows of a table in all runs that measured the metric."""
        for run in self.runs:
            if metric in run.metrics:
                yield from run.table(metric, table).to_pylist()

    def by_model(self, metric: str, table: str) -> dict[str, list[Row]]:
        """Return the rows of a table by model, in the order of the runs."""
        models: dict[str, list[Row]] = {}
        for row in self.rows(metric, table):
            models.setdefault(str(row["model"]), []).append(row)
        return models


def sink_rates(rows: Sequence[Row], first: int, last: int) -> str:
    """Return the share of heads in layers `first` … `last` that are sinks, with its interval over texts."""
    texts: dict[str, list[bool]] = {}
    for row in rows:
        if first <= row["layer"] <= last and row["score"] is not None:
            texts.setdefault(row["text"], []).append(row["score"] >= TAU)
    rates = np.array([[100 * np.mean(flags)] for _, flags in sorted(texts.items())])
    mean, low, high = (float(bound[0]) for bound in mean_interval(rates))
    return f"{mean:.0f} % ({low:.0f}–{high:.0f})"


def at_layer(rows: Sequence[Row], layer: int | None) -> Row:
    """Return the row of a layer."""
    return next(row for row in rows if row["layer"] == layer)


def with_interval(row: Row, value: str, low: str, high: str, digits: int) -> str:
    """Return a value with its interval, such as `1.50 (1.20–1.90)`."""
    cells = [row[name] for name in (value, low, high)]
    if None in cells:
        return "–"
    mean, lowest, highest = (f"{cell:,.{digits}f}" for cell in cells)
    return f"{mean} ({lowest}–{highest})"


def observations(runs: StoredRuns) -> dict[str, dict[str, str]]:
    """Return the cells of the first table, by title and model."""
    table: dict[str, dict[str, str]] = {}

    def put(title: str, model: str, cell: str) -> None:
        table.setdefault(title, {})[model] = cell

    for model, rows in runs.by_model("sinks", "texts").items():
        last_layer = max(row["layer"] for row in rows)
        put("heads that are sinks, all layers", model, sink_rates(rows, 0, last_layer))
        for first, last in BANDS:
            if last <= last_layer:
                put(f"layers {first} to {last}", model, sink_rates(rows, first, last))
    layers = runs.by_model("bos-norm", "layers")
    for model, (summary, *_) in runs.by_model("bos-norm", "summary").items():
        peak = at_layer(layers[model], summary["peak_layer"])
        put("largest norm of BOS", model, with_interval(peak, "bos_norm", "ci_low", "ci_high", 0))
        ratio = with_interval(peak, "bos_ratio", "bos_ratio_low", "bos_ratio_high", 0)
        put("times the mean of the others", model, ratio)
        put("layer that writes it", model, str(summary["write_layer"]))
    layers = runs.by_model("compression", "layers")
    for model, (summary, *_) in runs.by_model("compression", "summary").items():
        lowest = at_layer(layers[model], summary["entropy_min_layer"])
        entropy = with_interval(lowest, "entropy", "ci_low", "ci_high", 3)
        put("least matrix entropy, nats", model, f"{entropy}, layer {lowest['layer']}")
        without = with_interval(
            lowest,
            "entropy_without_massive",
            "entropy_without_massive_low",
            "entropy_without_massive_high",
            2,
        )
        put("the same layer without massive rows", model, without)
    for model, (summary, *_) in runs.by_model("massive-values", "summary").items():
        totals = ", ".join(f"{summary[f'{tensor}_total']:.0f}" for tensor in "qkv")
        put("massive values in Q, K, V", model, totals)
    return table


def causes(runs: StoredRuns) -> dict[str, dict[str, str]]:
    """Return the cells of the second table, perplexity ratios, by title and model."""
    table: dict[str, dict[str, str]] = {}
    for metric, titles in CONDITIONS.items():
        for row in runs.rows(metric, "conditions"):
            model, condition = str(row["model"]), row["condition"]
            if condition == "baseline":
                table.setdefault("perplexity", {})[model] = f"{row['ppl']:.1f}"
            elif condition in titles:
                digits = 3 if row["ratio"] < 1.1 else 2 if row["ratio"] < 10 else 1
                cell = with_interval(row, "ratio", "ci_low", "ci_high", digits)
                layer = "" if row["layer"] is None else f", layer {row['layer']}"
                table.setdefault(titles[condition], {})[model] = cell + layer
    return table


def markdown(table: Mapping[str, Mapping[str, str]], corner: str) -> str:
    """Return a table as Markdown, with a column for each model."""
    models = list(dict.fromkeys(model for cells in table.values() for model in cells))
    lines = [f"| {corner} | " + " | ".join(f"`{model}`" for model in models) + " |"]
    lines.append("|---|" + "---|" * len(models))
    for title, cells in table.items():
        lines.append(f"| {title} | " + " | ".join(cells.get(model, "–") for model in models) + " |")
    return "\n".join(lines)


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m tools.recalibrate.findings", description=__doc__)
    p.add_argument("runs", nargs="+", type=Path, help="folders written by phaselens run --out")
    args = p.parse_args()
    runs = StoredRuns(args.runs)
    print(markdown(observations(runs), "what they show"))
    print()
    print(markdown(causes(runs), "perplexity relative to the model itself"))


if __name__ == "__main__":
    main()
