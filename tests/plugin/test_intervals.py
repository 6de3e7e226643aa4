"""Means over texts with intervals, for metrics of plugins."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import phaselens
from phaselens.errors import InputError
from phaselens.plugin import TOO_FEW_TEXTS, Column, Display, TableSpec, interval_columns, mean_intervals
from phaselens.uncertainty import mean_interval
from tests.runs.metrics import probe
from tests.toys import letters, toy_lens


def measured(values: list[list[float]], **options: object):
    """Run a metric that keeps these values [text, layer]; return what `mean_intervals` gives, and its run."""
    results = {}

    def update(self, layer: object) -> None:
        indices = [int(index) for index in layer.batch.indices]
        self.per_text.add(layer, value=torch.tensor([values[index][layer.index] for index in indices]))

    def compute(self):
        stacked = self.per_text.stack("value")
        results["lists"] = mean_intervals(self, stacked, **options)
        results["expected"] = mean_interval(
            stacked[self.per_text.by_content],
            present=~np.isnan(stacked[self.per_text.by_content]),
            seed=self.seed,
        )
        rows = [(layer, *cells) for layer, cells in enumerate(zip(*results["lists"], strict=True))]
        return {"layers": self.table("layers", rows)}

    metric = probe(
        tables=(
            TableSpec("layers", (Column("layer", int), Column("value", float), *interval_columns("share"))),
        ),
        display=Display(value="value", title="value", low="ci_low", high="ci_high"),
        hooks=lambda self: ["blocks.{layer}.hook_resid_post"],
        update=update,
        compute=compute,
    )
    run = phaselens.run(
        toy_lens(), metrics=metric, texts=[letters(5 + index, index) for index in range(len(values))]
    )
    assert run.failed == []
    return results, run


def test_the_lists_are_those_of_mean_interval_in_the_order_of_the_content() -> None:
    results, run = measured([[0.1, 0.5], [0.4, 0.9], [0.2, float("nan")]])
    assert results["lists"] == [bound.tolist() for bound in results["expected"]]
    assert results["lists"][0] == pytest.approx([0.7 / 3, 0.7])
    assert run["probe"]["layers"].spec.columns[3].help.startswith("95 % interval")


@pytest.mark.slow
@pytest.mark.parametrize("explain", [True, False])
def test_one_text_has_no_interval_and_a_reason(explain: bool) -> None:
    results, run = measured([[0.1, 0.5], [0.3, float("nan")]], explain=explain)
    assert results["lists"][1][1] is None
    assert any("intervals are missing" in warning for warning in run.warnings) is explain
    assert TOO_FEW_TEXTS == "too-few-texts"


def test_values_of_another_number_of_texts_are_refused(phaselens_lens) -> None:
    metric = probe()(phaselens_lens("llama").info, probe().Params(), 0)
    with pytest.raises(InputError, match=r"of the 0 texts of per_text, received shape \(3,\)"):
        mean_intervals(metric, [0.1, 0.2, 0.3])
