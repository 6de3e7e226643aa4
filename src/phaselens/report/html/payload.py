"""The data of a report as JSON: values by head, the texts behind each layer's value, tokens, result tables.

Each part has a share of the file. What does not fit is left out, and `left_out` names it: the tables of a run directory
have everything.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from phaselens.plugin import CellValue, Table
from phaselens.report.html.by_head import head_data
from phaselens.report.html.token_text import readable_tokens
from phaselens.report.strings import printable
from phaselens.runs import MetricResult, Run
from phaselens.runs.paired_values import ValueKey, values_by_text

SCHEMA = "phaselens.report/1"
#: Bytes for each part of the data.
HEAD_BYTES, TEXT_BYTES, TOKEN_BYTES, TABLE_BYTES = 1_200_000, 500_000, 1_100_000, 700_000
_MAX_CELLS = 120_000
#: Texts listed for a layer at either end.
_N_EXTREMES = 6
TOKENS = "tokens"


class Budget:
    """Counts the bytes of a part of the data, and names what no longer fits."""

    def __init__(self, n_bytes: int) -> None:
        self.n_left = n_bytes
        self.left_out: list[str] = []

    def takes(self, name: str, value: object) -> bool:
        """Return whether a value fits, and count it if so."""
        size = len(json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode())
        if size > self.n_left:
            self.left_out.append(name)
            return False
        self.n_left -= size
        return True


def report_data(run: Run) -> dict[str, Any]:
    """Return the data that the page embeds, as plain JSON values."""
    budgets = {
        "heads": Budget(HEAD_BYTES),
        "texts": Budget(TEXT_BYTES),
        "tokens": Budget(TOKEN_BYTES),
        "tables": Budget(TABLE_BYTES),
    }
    metrics = {name: result for name, result in run.metrics.items() if result.metric.prints}
    heads = head_data(run, metrics, budgets["heads"])
    data = {
        "schema": SCHEMA,
        "models": [
            {"label": printable(model.info.label), "layers": model.info.n_layers, "heads": model.info.n_heads}
            for model in run.models
        ],
        "metrics": {
            name: {
                "title": printable(result.metric.title or name),
                "heads": heads.get(name, []),
                "texts": _texts_behind(run, name, result, budgets["texts"]),
            }
            for name, result in metrics.items()
        },
        "tokens": _tokens(run, budgets["tokens"]),
        "tables": _tables(metrics, budgets["tables"]),
    }
    data["left_out"] = [name for budget in budgets.values() for name in budget.left_out]
    return data


def rounded(value: CellValue, digits: int = 4) -> CellValue:
    """Return a number with few significant digits, which keeps the file small."""
    if isinstance(value, float):
        short = float(f"{value:.{digits}g}")
        return int(short) if short == int(short) and abs(short) < 1e6 else short
    return value


def _texts_behind(run: Run, name: str, result: MetricResult, budget: Budget) -> dict[str, Any] | None:
    """Return, for a column with a value by text and layer, the texts at either end of each layer of each model."""
    display = result.metric.display
    for table in result.tables.values():
        if "condition" in {column.name for column in table.spec.columns}:
            continue
        by_model = {model.info.label: values_by_text(table, model.info.label) for model in run.models}
        columns = next(iter(by_model.values()), {})
        if not columns:
            continue
        wanted = [display.value, display.by_head] if display is not None else []
        names = [column.name for column in columns]
        chosen = next((column for column in wanted if column in names), names[0])
        spec = next(column for column in columns if column.name == chosen)
        data = {
            "column": chosen,
            "unit": spec.unit,
            "models": [
                _extremes(next(v for c, v in by_model[model.info.label].items() if c.name == chosen))
                for model in run.models
            ],
        }
        return data if budget.takes(f"{name}: texts behind each layer", data) else None
    return None


def _extremes(values: Mapping[ValueKey, Mapping[str, float]]) -> dict[str, Any]:
    """Return by layer: the number of texts, their mean, and the texts with the highest and the lowest values."""
    layers: dict[str, Any] = {}
    for key, by_text in values.items():
        if key.layer is None or not by_text or str(key.layer) in layers:
            continue
        ordered = sorted(by_text.items(), key=lambda item: -item[1])
        if len(ordered) > 2 * _N_EXTREMES:
            ordered = ordered[:_N_EXTREMES] + ordered[-_N_EXTREMES:]
        layers[str(key.layer)] = {
            "n": len(by_text),
            "mean": rounded(sum(by_text.values()) / len(by_text)),
            "group": None if key.group is None else printable(key.group),
            "texts": [[printable(text), rounded(value)] for text, value in ordered],
        }
    return layers


def _tokens(run: Run, budget: Budget) -> list[dict[str, Any]]:
    """Return each kept text with its words and its values by layer, for each model that has them."""
    result = run.metrics.get(TOKENS)
    if result is None or not {"words", "tokens"} <= result.tables.keys():
        return []
    labels = [model.info.label for model in run.models]
    words: dict[tuple[str, str], list[str]] = {}
    for label, text, _, token in result.tables["words"].rows:
        words.setdefault((str(text), str(label)), []).append(str(token))
    values: dict[tuple[str, str], dict[int, list[tuple[CellValue, ...]]]] = {}
    for label, text, layer, _, *numbers in result.tables["tokens"].rows:
        by_layer = values.setdefault((str(text), str(label)), {})
        by_layer.setdefault(int(layer or 0), []).append(tuple(numbers))
    texts = []
    for text in dict.fromkeys(text for text, _ in words):
        models = [
            _model_tokens(words[text, label], values.get((text, label), {}))
            if (text, label) in words
            else None
            for label in labels
        ]
        entry = {"id": printable(text), "models": models}
        if budget.takes(f"tokens of text {printable(text)}", entry):
            texts.append(entry)
    return texts


def _model_tokens(
    names: Sequence[str], by_layer: Mapping[int, Sequence[tuple[CellValue, ...]]]
) -> dict[str, Any]:
    layers = sorted(by_layer)
    received, null, norm = (
        [[rounded(row[index], 3) for row in by_layer[layer]] for layer in layers] for index in range(3)
    )
    is_one_null = all(values == null[0] for values in null)
    return {
        "words": readable_tokens(names),
        "layers": layers,
        "received": received,
        "null": null[:1] if is_one_null else null,
        "norm": norm,
    }


def _tables(metrics: Mapping[str, MetricResult], budget: Budget) -> list[dict[str, Any]]:
    """Return the result tables that fit, smallest first, in the metrics' order."""
    candidates = [
        (name, table_name, table)
        for name, result in metrics.items()
        for table_name, table in result.tables.items()
    ]
    encoded: dict[tuple[str, str], dict[str, Any]] = {}
    for name, table_name, table in sorted(candidates, key=lambda entry: len(entry[2].rows)):
        title = f"table {name}.{table_name} ({len(table.rows):,} rows)"
        if len(table.rows) * len(table.spec.columns) > _MAX_CELLS:
            budget.left_out.append(title)
            continue
        columns = list(_columns(table))
        if budget.takes(title, columns):
            encoded[name, table_name] = {
                "metric": name,
                "name": table_name,
                "help": table.spec.help,
                "rows": len(table.rows),
                "columns": columns,
            }
    return [encoded[name, table] for name, table, _ in candidates if (name, table) in encoded]


def _columns(table: Table) -> Iterator[dict[str, Any]]:
    """Yield the columns of a table; text is a list of distinct words and their indices."""
    for index, column in enumerate(table.spec.columns):
        cells = [row[index] for row in table.rows]
        head = {"name": column.name, "unit": column.unit, "help": column.help}
        if column.type is str:
            words = list(dict.fromkeys(cell for cell in cells if cell is not None))
            numbers = {word: number for number, word in enumerate(words)}
            yield head | {
                "words": [printable(str(word)) for word in words],
                "values": [None if cell is None else numbers[cell] for cell in cells],
            }
        else:
            yield head | {"values": [rounded(cell) for cell in cells]}
