"""Attention that selects its keys, or adds to its scores what depends on the text, is refused for just that."""

from __future__ import annotations

import pytest
import torch
from tools.families.models import tiny_model
from torch import nn

import phaselens
from phaselens.errors import RefusedModel
from phaselens.lens.interface_options import require_served


@pytest.mark.parametrize("option", ["block_indices", "sinks"])
def test_an_option_that_changes_attention_is_refused_by_its_effect(option: str) -> None:
    with pytest.raises(
        RefusedModel, match=r"^Linear (attends only to|adds) .* PhaseLens measures one softmax"
    ):
        require_served(nn.Linear(1, 1), {"position_ids": torch.zeros(1), option: torch.zeros(1)})


@pytest.mark.slow
def test_a_bias_of_the_scores_is_served() -> None:
    lens = phaselens.load(tiny_model("inkling_text"))
    assert set(lens.info.positions) == {"relative"}


def test_options_without_a_value_and_others_are_served() -> None:
    require_served(nn.Linear(1, 1), {"indices": None, "position_ids": torch.zeros(1), "sliding_window": 7})


@pytest.mark.parametrize(
    ("model_type", "effect"),
    [
        ("minimax_m3_vl_text", "MiniMaxM3VLAttention attends only to the blocks of keys that an indexer"),
    ],
)
def test_a_model_with_an_indexer_is_refused_for_it(model_type: str, effect: str) -> None:
    with pytest.raises(RefusedModel, match=effect) as refused:
        phaselens.load(tiny_model(model_type))
    assert str(refused.value).startswith(f"{model_type} (")
    assert str(refused.value).endswith("use a model type that docs/families.md lists as served")
