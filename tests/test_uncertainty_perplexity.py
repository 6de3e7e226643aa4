"""Perplexity: all tokens together, what is unknown, and published ratios and increases."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from phaselens.uncertainty import compare_losses, perplexity

GOLDENS = Path(__file__).parent / "data" / "goldens"


def test_perplexity_weighs_tokens_and_nothing_else():
    losses, tokens = [1.0, 2.0, 4.0], [10, 20, 70]
    assert float(perplexity(losses, tokens)) == pytest.approx(math.exp((10 + 40 + 280) / 100))
    assert float(perplexity(losses, np.array(tokens) / 7)) == pytest.approx(float(perplexity(losses, tokens)))
    cells = np.stack([losses, losses[::-1]], 1)
    assert perplexity(cells, tokens).tolist() == pytest.approx(
        [float(perplexity(column, tokens)) for column in cells.T]
    )
    pooled = np.repeat(losses, tokens)
    assert float(perplexity(losses, tokens)) == pytest.approx(math.exp(pooled.mean()))


def test_perplexity_of_what_is_unknown_is_masked():
    assert (
        perplexity([[1.0, 1.0, np.nan, 710.0], [1.0, np.inf, 1.0, 710.0]], [1, 1]).tolist()
        == [math.e] + [None] * 3
    )
    assert perplexity([1.0, np.nan], [3, 0]).tolist() == math.e
    assert perplexity(np.empty((0, 2)), []).tolist() == [None, None]
    assert perplexity([1.0], [0]).tolist() is None
    with pytest.raises(ValueError, match="weights of at least 0, received inf for text 1"):
        perplexity([1.0, 2.0], [1, np.inf])
    with pytest.raises(ValueError, match="loss of 2, weights of 1"):
        perplexity([1.0, 2.0], [1])
    with pytest.raises(ValueError, match="received a single number"):
        perplexity(1.0, [1])


def stored_ratios():
    """(name, baseline perplexity, perplexity, ratio) of each published run."""
    stored = json.loads((GOLDENS / "perplexity.json").read_text())
    for experiment in ("original_interventions", "layer1_ablation"):
        for model, runs in stored[experiment]["values"].items():
            for condition, run in runs.items():
                yield f"{experiment} {model} {condition}", runs["baseline"]["ppl"], run["ppl"], run["ratio"]
    for model, run in stored["bos_v_ablation"]["values"].items():
        for layers in ("spike_layer", "all_layers"):
            yield f"bos_v {model} {layers}", run["baseline_ppl"], run[f"{layers}_ppl"], run[f"{layers}_ratio"]


def test_published_ratios_come_out_of_their_perplexities():
    runs = list(stored_ratios())
    assert len(runs) == 22
    for name, before, after, ratio in runs:
        found = compare_losses([math.log(before)], [math.log(after)], [1000])
        assert found.ratio == pytest.approx(ratio, rel=1e-12), name
        assert found.ppl == pytest.approx(after, rel=1e-12), name


def test_published_increases_come_out_of_their_perplexities():
    for run in json.loads((GOLDENS / "disruption.json").read_text())["results"].values():
        for each in [*run["trials"], *run["by_eval_set"].values()]:
            for arm in ("massive", "random"):
                found = compare_losses([math.log(each["baseline"])], [math.log(each[arm])], [1000])
                assert found.increase_percent == pytest.approx(
                    each[f"{arm}_increase_pct"], rel=1e-9, abs=1e-9
                )
