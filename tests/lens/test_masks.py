"""Masks and biases that reach attention from a model's own code."""

from __future__ import annotations

import pytest
import torch
from tools.families.models import tiny_model
from transformers.masking_utils import (
    blockwise_overlay,
    causal_mask_function,
    or_masks,
    sliding_window_causal_mask_function,
)

import phaselens
from phaselens.lens.masks import elementwise, state_causality, without_bias

FAR = 1 << 30


@pytest.mark.parametrize("function", [causal_mask_function, sliding_window_causal_mask_function(7)])
def test_an_overlay_of_blocks_hides_and_shows_nothing_in_a_text_without_blocks(function):
    with_overlay = or_masks(function, blockwise_overlay(torch.full((1, 4), -1)))
    query, key = torch.tensor([[FAR]]), torch.tensor([[0, FAR - 7, FAR - 6, FAR, FAR + 1]])
    assert torch.equal(elementwise(with_overlay)(query, key), elementwise(function)(query, key))


def test_an_overlay_of_blocks_is_kept_where_tokens_are_in_one():
    overlay = or_masks(causal_mask_function, blockwise_overlay(torch.tensor([[-1, 0, 0, -1]])))
    query = torch.arange(4)[:, None]
    assert elementwise(overlay)(query, query.T).int().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 1, 0],
        [1, 1, 1, 0],
        [1, 1, 1, 1],
    ]


def additive(values: torch.Tensor) -> torch.Tensor:
    """Return an additive mask of causal attention with these values, [1, head, query, key]."""
    causal = torch.ones(values.shape[-2:], dtype=torch.bool).tril()
    return values.masked_fill(~causal, torch.finfo(values.dtype).min)


def test_an_additive_mask_is_a_causal_one_with_a_bias():
    assert without_bias(additive(torch.zeros(1, 1, 5, 5))) == (None, None)
    by_key = torch.randn(1, 2, 1, 5)
    mask, bias = without_bias(additive(by_key.expand(1, 2, 5, 5)))
    assert mask is None
    assert torch.equal(bias, by_key)
    matrix = torch.randn(1, 2, 5, 5)
    mask, bias = without_bias(additive(matrix))
    assert mask is None
    assert torch.equal(bias, matrix.tril())


def test_a_key_that_no_query_sees_has_no_bias():
    values = additive(torch.ones(1, 1, 4, 4))
    values[..., 2] = torch.finfo(torch.float32).min
    mask, bias = without_bias(values)
    assert mask[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 1]]
    assert bias.flatten().tolist() == [1.0, 1.0, 0.0, 1.0]


def test_modules_of_a_causal_model_state_that_they_are_causal():
    model = tiny_model("bigbird_pegasus")
    attention = [module for module in model.modules() if hasattr(module, "is_causal")]
    assert not any(module.is_causal for module in attention)
    state_causality(model)
    assert all(module.is_causal for module in attention)


def test_modules_of_a_model_that_looks_ahead_stay_as_they_are():
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    state_causality(model)
    assert not any(layer.self_attn.is_causal for layer in model.model.layers)
    with pytest.raises(phaselens.RefusedModel, match="LlamaAttention attends in both directions"):
        phaselens.load(model)
