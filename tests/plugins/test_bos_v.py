"""bos-v: what attention brings back from position 0, against a naive reference and a planted truth."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import phaselens
from phaselens.plugin import plugins
from phaselens.testing import check_metric
from tests.marks import first_quick
from tests.plugins.ablations import content, naive, notes, perplexity, predicted, row, rows, run
from tests.plugins.bos_models import READER, bos_lens
from tests.toys import letters, toy_lens

METRIC = "bos-v"


@pytest.mark.parametrize("family", first_quick(["llama-gqa", "mistral", "gpt2"]))
def test_every_number_is_that_of_a_naive_implementation(family: str) -> None:
    from phaselens_plugins._causal import elsewhere

    lens = toy_lens(family, dtype=torch.float64)
    n = predicted(lens)
    before = perplexity(naive(lens, []), n)
    points = [f"blocks.{layer}.attn.hook_v" for layer in range(lens.info.n_layers)]
    found = run(METRIC, lens, params={"layer": 1, "seeds": 2})
    for name, where in (("all layers", points), ("given layer", points[1:2])):
        one = row(found, METRIC, name)
        assert one["ratio"] == pytest.approx(perplexity(naive(lens, where), n) / before, rel=1e-6)
        draws = [
            naive(lens, where, lambda length, text, seed=seed: elsewhere(length, content(text), seed))
            for seed in range(2)
        ]
        control = row(found, METRIC, f"other position: {name}")
        assert control["ppl"] == pytest.approx(perplexity(np.mean(draws, 0), n), rel=1e-6)
    swept = run(METRIC, lens, params={"at": "sweep", "layer": 1, "seeds": 0})
    assert [one["layer"] for one in rows(swept, METRIC)[1:]] == [None, *range(lens.info.n_layers)]
    assert row(swept, METRIC, "each layer", 1)["ppl"] == pytest.approx(
        row(found, METRIC, "given layer")["ppl"], rel=1e-12
    )


def test_only_the_layer_that_reads_position_0_matters() -> None:
    """Where values are zero already, the ratio is exactly 1; and nothing changes for the token that position 0 predicts
    but by its own attention to itself."""
    found = run(METRIC, bos_lens(), params={"at": "sweep", "seeds": 0})
    ratios = {one["layer"]: one["ratio"] for one in rows(found, METRIC)[1:]}
    only, every = ratios.pop(READER), ratios.pop(None)
    assert only > 1.5
    assert every == pytest.approx(only, rel=1e-12)
    assert list(ratios.values()) == [1.0, 1.0, 1.0]
    assert notes(found, "each layer (layer 0)", "stood there already, in every text")


def test_a_control_that_finds_only_zeros_is_null_with_a_reason() -> None:
    """Only position 0 has a value there: a function that changes nothing is no control, not a control of 1."""
    found = run(METRIC, bos_lens(), params={"layer": READER, "seeds": 1})
    control = row(found, METRIC, "other position: given layer")
    assert control["ratio"] is None
    assert notes(found, "other position: given layer (layer 3) is null", "changed nothing")
    assert not [one for one in rows(found, METRIC, "reach") if one["condition"] == control["condition"]]


def test_a_layer_that_is_not_there_is_refused() -> None:
    asked: Any = [(plugins().metric(METRIC), {"layer": 7})]
    found = phaselens.run(toy_lens("llama"), metrics=asked, texts=[letters(4)])
    (failure,) = found.metrics[METRIC].failures
    assert failure.message == "layer is 7, but llama has layers 0 to 1"


@pytest.mark.slow
@pytest.mark.parametrize("params", [{"layer": 0}, {"at": "sweep", "seeds": 1}])
def test_the_contract(params: dict[str, Any]) -> None:
    check_metric(plugins().metric(METRIC), params)
