"""Rotations that attention modules apply themselves, and rotations that a probe of ordinary tokens would not show."""

from __future__ import annotations

import pytest
import torch
from tools.families.models import tiny_model

import phaselens
from phaselens.testing import tiny_model as tiny_family

TOKENS = torch.arange(4, 24)[None]


def rotated_by_hand(model, nulled):
    """Return the model's logits, with every table of sines and cosines that of position 0 if `nulled`."""
    if nulled:
        for module in model.modules():
            if hasattr(module, "embed_positions"):
                table = module.embed_positions
                module.embed_positions = torch.cat([torch.zeros_like(table), torch.ones_like(table)], -1)[
                    :, table.shape[1] // 2 : table.shape[1] // 2 + table.shape[1]
                ]
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["gptj", "codegen"])
def test_an_interleaved_rotation_by_a_table_is_nulled(model_type):
    """GPT-J rotates pairs 2i and 2i + 1 by sines and cosines that it looks up by position."""
    lens = phaselens.load(tiny_model(model_type), positions="nope")
    assert set(lens.info.positions) == {"nope"}
    assert str(lens.info.rotations[0]) == "4 of 8 dimensions, 2i with 2i + 1"
    expected = rotated_by_hand(tiny_model(model_type), nulled=True)
    torch.testing.assert_close(lens.stream(TOKENS, unembed=True), expected, atol=1e-6, rtol=0)
    lens.set_rotation(nulled=False)
    expected = rotated_by_hand(tiny_model(model_type), nulled=False)
    torch.testing.assert_close(lens.stream(TOKENS, unembed=True), expected, atol=1e-6, rtol=0)
    with lens.nulled_rotation(1):
        assert lens.info.positions == ("rope", "nope")


def test_a_rotation_by_a_table_ends_with_the_table():
    lens = phaselens.load(tiny_model("gptj"))
    with pytest.raises(phaselens.InputError, match=r"129 tokens, but .* has a table of positions for 128"):
        lens.stream(torch.ones(1, 129, dtype=torch.long))


@pytest.mark.slow
def test_a_rotation_by_positions_that_the_model_counts_itself_is_seen():
    """RoFormer takes no positions."""
    assert phaselens.load(tiny_model("roformer")).info.positions == ("rope", "rope")
    with pytest.raises(phaselens.RefusedModel, match="layer 0 has 'rope' positions"):
        phaselens.load(tiny_model("roformer"), positions="nope")


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["bert", "jamba", "granitemoehybrid"])
def test_layers_that_do_not_rotate_are_not_said_to(model_type):
    assert "rope" not in phaselens.load(tiny_model(model_type)).info.positions


def test_a_rotation_is_nulled_where_the_first_tokens_have_no_queries_and_keys():
    """In a hand-made model, only the embeddings of later tokens may have queries and keys."""
    model = tiny_family("llama", tie_word_embeddings=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[:30, :16] = 0.0
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight[:, 16:] = 0.0
            layer.self_attn.k_proj.weight[:, 16:] = 0.0
            layer.self_attn.o_proj.weight[:16] = 0.0
            layer.mlp.down_proj.weight[:16] = 0.0
    lens = phaselens.load(model, positions="nope")
    assert lens.info.positions == ("nope", "nope")
    assert lens.nulled_layers == (0, 1)
