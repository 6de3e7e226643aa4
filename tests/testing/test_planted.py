"""Planted truths hold, for dense attention and for the metrics that measure them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import phaselens
from phaselens.errors import InputError
from phaselens.testing import PLANTED, Planted, plant

Planter = Callable[..., Planted]


def activation(planted: Planted, name: str) -> torch.Tensor:
    """Return the tensor at one hook point, for the planted text."""
    caught: list[torch.Tensor] = []
    tokens = torch.tensor([planted.lens.text_tokenizer(planted.text)["input_ids"]])
    planted.lens.stream(tokens, [(name, lambda tensor, hook: caught.append(tensor))])
    return caught[0]


@pytest.mark.parametrize("positions", ["auto", "nope"])
def test_a_uniform_head_attends_equally_to_all_tokens(phaselens_planted: Planter, positions: str) -> None:
    planted = phaselens_planted("uniform head", positions=positions)
    pattern = activation(planted, f"blocks.{planted.layer}.attn.hook_pattern")[0]
    n = pattern.shape[-1]
    even = torch.ones(n, n, dtype=pattern.dtype).tril() / torch.arange(1, n + 1)[:, None]
    torch.testing.assert_close(pattern[planted.head], even)
    assert (pattern[0] - even).abs().max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("positions", ["auto", "nope"])
@pytest.mark.parametrize(("kind", "position"), [("pure sink", 0), ("sink at position 7", 7)])
def test_a_planted_sink_takes_all_attention(
    phaselens_planted: Planter, kind: str, position: int, positions: str
) -> None:
    planted = phaselens_planted(kind, positions=positions)
    assert planted.position == position
    pattern = activation(planted, f"blocks.{planted.layer}.attn.hook_pattern")[0]
    assert pattern[planted.head, position:, position].min() == 1.0
    other_heads = [head for head in range(pattern.shape[0]) if head != planted.head]
    assert pattern[other_heads, position + 1 :, position].min() < 0.9


def test_the_sinks_metric_finds_the_planted_sink(phaselens_planted: Planter) -> None:
    planted = phaselens_planted("sink at position 7")
    requests = [("sinks", {"sink_position": 7})]
    run = phaselens.run(planted.lens, metrics=requests, texts=[planted.text])
    (score,) = [
        row["score"]
        for row in run.rows("sinks", "heads").records()
        if (row["layer"], row["head"]) == (planted.layer, planted.head)
    ]
    assert score == 1.0


@pytest.mark.parametrize(
    ("kind", "positions"), [("massive dimension", slice(None)), ("massive token", slice(0, 1))]
)
def test_a_massive_dimension_stays_through_all_layers(
    phaselens_planted: Planter, kind: str, positions: slice
) -> None:
    planted = phaselens_planted(kind)
    for layer in range(2):
        column = activation(planted, f"blocks.{layer}.hook_resid_post")[0, :, planted.dimension]
        expected = torch.zeros_like(column)
        expected[positions] = 1000.0
        torch.testing.assert_close(column, expected)


def test_each_truth_has_a_statement_and_is_created_once_per_session(phaselens_planted: Any) -> None:
    assert all(phaselens_planted(kind).statement for kind in PLANTED)
    assert phaselens_planted("pure sink") is phaselens_planted("pure sink")


def test_an_unknown_truth_gets_close_matches() -> None:
    with pytest.raises(InputError, match="no planted truth 'pure snik'; did you mean pure sink"):
        plant("pure snik")
