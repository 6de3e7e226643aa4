"""Metrics by head on models whose layers have different numbers of heads: 4 of queries in one layer, 2 in another."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
from tools.families.models import tiny_model

import phaselens
from tests.plugins.ablations import run
from tests.toys import letters, toy_tokenizer

TEXTS = [letters(20), letters(24, 3), letters(17, 5)]
#: The heads of queries, and of keys, by layer.
HEADS = {"laguna": (4, 2), "mimo_v2_flash": (4, 4, 4)}
N_ROWS = {"massive-values": "parts", "rope-frequencies": "heads"}


@cache
def lens_of(model_type: str) -> Any:
    lens = phaselens.load(tiny_model(model_type), label=model_type)
    lens.text_tokenizer = toy_tokenizer()
    return lens


@pytest.mark.slow
def test_the_number_of_heads_of_each_layer_is_known() -> None:
    info = lens_of("laguna").info
    assert (info.n_heads, info.heads, [info.n_heads_in(layer) for layer in (0, 1)]) == (4, (4, 2), [4, 2])
    assert lens_of("mimo_v2_flash").info.heads == ()


@pytest.mark.slow
@pytest.mark.parametrize(
    "metric", ["sinks", "attention-patterns", "bos-write", "qk-geometry", "head-ablation"]
)
def test_a_layer_has_a_row_for_each_of_its_heads(metric: str) -> None:
    result = run(metric, lens_of("laguna"), texts=TEXTS)
    rows = result.rows(metric, "heads").records()
    assert [(row["layer"], row["head"]) for row in rows] == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]


def test_the_mean_of_a_layer_is_that_of_its_heads() -> None:
    result = run("attention-patterns", lens_of("laguna"), texts=TEXTS)
    heads = result.rows("attention-patterns", "heads").records()
    for row in result.rows("attention-patterns", "layers").records():
        of_layer = [head["entropy"] for head in heads if head["layer"] == row["layer"]]
        assert math.isclose(row["entropy"], sum(of_layer) / len(of_layer), rel_tol=1e-12)
    assert not any("missing" in warning for warning in result.warnings)


def test_sink_rates_count_the_heads_that_exist() -> None:
    result = run("sinks", lens_of("laguna"), texts=TEXTS, params={"threshold": 0.0})
    assert [row["sink_rate"] for row in result.rows("sinks", "layers").records()] == [1.0, 1.0]
    (summary,) = result.rows("sinks", "summary").records()
    assert (summary["sink_rate"], summary["n_texts"]) == (1.0, 3)


def test_layers_may_differ_in_key_heads() -> None:
    parts = (
        run("massive-values", lens_of("mimo_v2_flash"), texts=TEXTS).rows("massive-values", "parts").records()
    )
    n_heads = {
        (row["layer"], row["tensor"]): 1
        + max(
            other["head"]
            for other in parts
            if (other["layer"], other["tensor"]) == (row["layer"], row["tensor"])
        )
        for row in parts
    }
    facts = [block.attn.facts for block in lens_of("mimo_v2_flash").blocks]
    assert n_heads == {
        (layer, tensor): facts[layer].n_heads if tensor == "q" else facts[layer].n_kv_heads
        for layer, tensor in n_heads
    }
    assert len({facts[layer].n_kv_heads for layer, _ in n_heads}) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "metric", ["rope-frequencies", "sink-removal", "p-rope", "massive-values", "segments"]
)
def test_other_metrics_by_head_run(metric: str) -> None:
    params = {"segments": {"symbols": "abcd", "lengths": "100"}}.get(metric, {})
    run(metric, lens_of("laguna"), texts=TEXTS, params=params)
