"""Runs whose reports are tested: toy models with hostile names, a third party's metric, a section of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import phaselens
from phaselens.data import Text
from phaselens.plugin import Column, Display, LayerView, Metric, Params, ReportSection, Table, TableSpec
from phaselens.runs import Run
from tests.toys import letters, toy_lens

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
