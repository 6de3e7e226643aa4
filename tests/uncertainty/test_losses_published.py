"""Published perplexity ratios and increases."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.uncertainty.comparisons import compare_losses

GOLDENS = Path(__file__).parents[1] / "data" / "goldens"


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


def test_published_ratios_follow_from_their_perplexities():
    runs = list(stored_ratios())
    assert len(runs) == 22
    for name, baseline_ppl, ppl, ratio in runs:
        comparison = compare_losses([math.log(baseline_ppl)], [math.log(ppl)], [1000])
        assert comparison.ratio == pytest.approx(ratio, rel=1e-12), name
        assert comparison.ppl == pytest.approx(ppl, rel=1e-12), name


def test_published_increases_follow_from_their_perplexities():
    for run in json.loads((GOLDENS / "disruption.json").read_text())["results"].values():
        for trial in [*run["trials"], *run["by_eval_set"].values()]:
            for arm in ("massive", "random"):
                comparison = compare_losses([math.log(trial["baseline"])], [math.log(trial[arm])], [1000])
                increase = 100 * (comparison.ratio - 1)
                assert increase == pytest.approx(trial[f"{arm}_increase_pct"], rel=1e-9, abs=1e-9)
