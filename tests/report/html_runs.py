"""Runs whose reports are tested: toy models with hostile names, a third party's metric, a section of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import phaselens
from phaselens.data import Text
from phaselens.plugin import Column, Display, LayerView, Metric, Params, ReportSection, Table, TableSpec
from phaselens.runs import MetricResult, ModelRecord, Run, TextRecord
from phaselens_plugins.tokens import Tokens
from tests.toys import letters, toy_info, toy_lens

SCRIPT = "<script>window.hacked=1</script>"
ESCAPE = "\x1b[31mred\x1b[0m"
TEXTS = [
    Text(f"text {SCRIPT}", letters(9)),
    Text(f"text {ESCAPE}", letters(14, 5)),
    *(Text(f"text {n}", letters(8 + n, n)) for n in range(6)),
]


class Spread(Metric[Params]):
    """Largest absolute value of the residual stream by text, layer and, as a stand-in for heads, quarter."""

    name = "spread"
    version = "1"
    title = f"spread {SCRIPT}"
    description = f"largest values {ESCAPE}"
    tables = (
        TableSpec(
            "texts", (Column("text", str), Column("layer", int), Column("spread"), Column("n_tokens", int))
        ),
        TableSpec("layers", (Column("layer", int), Column("spread"), Column("null"))),
        TableSpec("heads", (Column("layer", int), Column("head", int), Column("part"), Column("part_null"))),
    )
    display = Display("spread", "spread", null="null", by_head="part")

    def hooks(self) -> Sequence[str]:
        return ["blocks.{layer}.hook_resid_post"]

    def update(self, layer: LayerView) -> None:
        values = layer.float64("hook_resid_post").abs() * layer.batch.real[..., None]
        self.per_text.add(layer, spread=values.amax((1, 2)))

    def compute(self) -> Mapping[str, Table]:
        spread = self.per_text.stack("spread")
        texts = [
            (text, layer, spread[row, layer], self.per_text.lengths[row])
            for row, text in enumerate(self.per_text.texts)
            for layer in range(spread.shape[1])
        ]
        means = spread.mean(0)
        heads = [
            (layer, head, mean * (head + 1), 0.5)
            for layer, mean in enumerate(means)
            for head in range(self.model.n_heads)
        ]
        return {
            "texts": self.table("texts", texts),
            "layers": self.table("layers", [(layer, mean, 0.5) for layer, mean in enumerate(means)]),
            "heads": self.table("heads", heads),
        }

    @classmethod
    def report(cls, tables: Mapping[str, Table], params: Params) -> list[ReportSection]:
        n_rows = len(tables["layers"].rows)
        return [
            ReportSection(
                f"Reading {SCRIPT}",
                (f"There are {n_rows} rows. {ESCAPE}",),
                ("what", "value"),
                ((SCRIPT, 0.5),),
            )
        ]


def hostile_run(out: Path | None = None, metrics: Sequence[Any] = (), texts: Sequence[Text] = TEXTS) -> Run:
    """Return a run of two toy models whose names hold markup and a terminal's escape code."""
    lenses = [
        toy_lens("llama", label=f"one {SCRIPT}"),
        toy_lens("llama-drope-nope", label=f"two {ESCAPE}", seed=1),
    ]
    chosen = [*(metrics or ("sinks", "bos-norm", "bos-v")), Spread, ("tokens", {"n_texts": 3})]
    return phaselens.run(lenses, metrics=chosen, texts=texts, out=out)


def large_run(n_layers: int = 32, n_heads: int = 32, n_metrics: int = 15, n_texts: int = 40) -> Run:
    """Return a run made by hand of two large models: for each metric tables by text, head and layer, and tokens."""
    random = np.random.default_rng(0)
    labels = ("base", "recalibrated")
    models = [
        ModelRecord(
            replace(toy_info(n_layers=n_layers, n_heads=n_heads, label=label), positions=("rope",) * n_layers),
            "auto", 0, True, 9999,
        )
        for label in labels
    ]  # fmt: skip
    texts = [TextRecord(f"a-book-{n:03}", "00", dict.fromkeys(labels, 256)) for n in range(n_texts)]
    results = {}
    for number in range(n_metrics):
        metric = _many_columns(number)
        result = results[metric.name] = MetricResult(metric, Params(), "phaselens 1")
        for label in labels:
            by_text = [
                (text.id, layer, *random.random(2).tolist(), 256)
                for text in texts
                for layer in range(n_layers)
            ]
            by_head = [
                (layer, head, *random.random(10).tolist())
                for layer in range(n_layers)
                for head in range(n_heads)
            ]
            by_layer = [(layer, *random.random(4).tolist()) for layer in range(n_layers)]
            for name, rows in (("texts", by_text), ("heads", by_head), ("layers", by_layer)):
                result.add(label, name, metric.table(name, rows), {})
    details = results["tokens"] = MetricResult(Tokens, Tokens.Params(), "phaselens 1")
    for label in labels:
        words = [(text.id, position, "Ġword") for text in texts[:6] for position in range(256)]
        values = [
            (text.id, layer, position, *random.random(3).tolist())
            for text in texts[:6]
            for layer in range(n_layers)
            for position in range(256)
        ]
        details.add(label, "words", Tokens.table("words", words), {})
        details.add(label, "tokens", Tokens.table("tokens", values), {})
    return Run(models, texts, results, [], {"seed": 0, "texts": "given"}, {"phaselens": "1"})


def _many_columns(number: int) -> type[Metric[Any]]:
    columns = [Column(f"value_{index}", float, "share") for index in range(10)]
    return type(
        "Many",
        (Spread,),
        {
            "name": f"metric-{number}",
            "title": f"metric number {number}",
            "tables": (
                TableSpec(
                    "texts",
                    (Column("text", str), Column("layer", int), *columns[:2], Column("n_tokens", int)),
                ),
                TableSpec("heads", (Column("layer", int), Column("head", int), *columns)),
                TableSpec(
                    "layers",
                    (Column("layer", int), Column("value"), Column("low"), Column("high"), Column("null")),
                ),
            ),
            "display": Display("value", "value", low="low", high="high", null="null", by_head="value_0"),
            "report": classmethod(lambda cls, tables, params: ()),
            "__module__": __name__,
        },
    )
