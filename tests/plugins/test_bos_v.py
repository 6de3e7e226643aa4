"""bos-v: removing the value at position 0, against a naive reference and a planted truth."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import phaselens
from phaselens.plugin import plugins
from phaselens.testing import check_metric
from tests.marks import mark_later_slow
from tests.plugins.ablations import content, naive, notes, perplexity, predicted, row, rows, run
from tests.plugins.bos_models import READER, bos_lens
from tests.toys import letters, toy_lens

METRIC = "bos-v"


@pytest.mark.slow
@pytest.mark.parametrize("family", mark_later_slow(["llama-gqa", "mistral", "gpt2"]))
def test_every_number_equals_a_naive_implementation(family: str) -> None:
    from phaselens_plugins._causal import draw_other_position

    lens = toy_lens(family, dtype=torch.float64)
    n = predicted(lens)
    base_ppl = perplexity(naive(lens, []), n)
    points = [f"blocks.{layer}.attn.hook_v" for layer in range(lens.info.n_layers)]
    result = run(METRIC, lens, params={"layer": 1, "seeds": 2})
    for name, name_points in (("all layers", points), ("given layer", points[1:2])):
        record = row(result, METRIC, name)
        assert record["ratio"] == pytest.approx(perplexity(naive(lens, name_points), n) / base_ppl, rel=1e-6)
        draws = [
            naive(
                lens,
                name_points,
                lambda length, text, seed=seed: draw_other_position(length, content(text), seed),
            )
            for seed in range(2)
        ]
        control = row(result, METRIC, f"other position: {name}")
        assert control["ppl"] == pytest.approx(perplexity(np.mean(draws, 0), n), rel=1e-6)
    swept = run(METRIC, lens, params={"at": "sweep", "layer": 1, "seeds": 0})
    assert [record["layer"] for record in rows(swept, METRIC)[1:]] == [None, *range(lens.info.n_layers)]
    assert row(swept, METRIC, "each layer", 1)["ppl"] == pytest.approx(
        row(result, METRIC, "given layer")["ppl"], rel=1e-12
    )


def test_only_the_layer_that_reads_position_0_matters() -> None:
    """Where values are already zero, the ratio is exactly 1.

    The token that position 0 predicts changes only through the attention of position 0 to itself.
    """
    result = run(METRIC, bos_lens(), params={"at": "sweep", "seeds": 0})
    ratios = {record["layer"]: record["ratio"] for record in rows(result, METRIC)[1:]}
    reader_ratio, all_layers = ratios.pop(READER), ratios.pop(None)
    assert reader_ratio > 1.5
    assert all_layers == pytest.approx(reader_ratio, rel=1e-12)
    assert list(ratios.values()) == [1.0, 1.0, 1.0]
    assert notes(result, "each layer (layer 0)", "every text already had the value")


def test_a_control_that_meets_only_zeros_is_missing_with_a_reason() -> None:
    """Only position 0 has a value there: a function that changes nothing is not a control with ratio 1."""
    result = run(METRIC, bos_lens(), params={"layer": READER, "seeds": 1})
    control = row(result, METRIC, "other position: given layer")
    assert control["ratio"] is None
    assert notes(result, "other position: given layer (layer 3) is missing", "changed no value")
    assert not [
        record for record in rows(result, METRIC, "reach") if record["condition"] == control["condition"]
    ]


def test_a_layer_that_the_model_lacks_is_refused() -> None:
    metrics: Any = [(plugins().metric(METRIC), {"layer": 7})]
    result = phaselens.run(toy_lens("llama"), metrics=metrics, texts=[letters(4)])
    (failure,) = result.metrics[METRIC].failures
    assert failure.message == "layer is 7, but llama has layers 0 to 1"


@pytest.mark.slow
@pytest.mark.parametrize("params", [{"layer": 0}, {"at": "sweep", "seeds": 1}])
def test_the_metric_keeps_the_contract(params: dict[str, Any]) -> None:
    check_metric(plugins().metric(METRIC), params)
