"""The network: a plain Llama, and the same network with its rotation nulled."""

from __future__ import annotations

from typing import Any

import torch
from tools.train_pair.corpus import BOS_ID, EOS_ID
from tools.train_pair.recipe import PairRecipe
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM


def llama_config(recipe: PairRecipe) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.d_model,
        intermediate_size=recipe.d_mlp,
        num_hidden_layers=recipe.n_layers,
        num_attention_heads=recipe.n_heads,
        num_key_value_heads=recipe.n_heads,
        max_position_embeddings=recipe.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.rope_theta},
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=None,
        use_cache=False,
    )


def build(recipe: PairRecipe) -> LlamaForCausalLM:
    """Return a Llama with transformers' own initialisation, drawn from `recipe.seed`."""
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(llama_config(recipe))
    model.set_attn_implementation("sdpa")
    return model


class NullRotation(nn.Module):
    """Replacement of a rotary embedding: cos = its attention factor, sin = 0, for all positions."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, x: Tensor, position_ids: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return cos and sin in the shape and type that the rotary embedding returns."""
        cos, sin = self.rotary(x, position_ids, **kwargs)
        factor = float(getattr(self.rotary, "attention_scaling", 1.0))
        return torch.full_like(cos, factor), torch.zeros_like(sin)


def null_rotation(model: Any) -> None:
    """Null the rotation of a Llama-type model in place; weights and their names stay as they are.

    Raises:
        ValueError: for a model whose decoder has no `rotary_emb`.
    """
    if not isinstance(getattr(model.model, "rotary_emb", None), nn.Module):
        raise ValueError(
            f"{type(model).__name__} has no model.rotary_emb, whose rotation could be nulled; "
            "use a Llama-type model"
        )
    model.model.rotary_emb = NullRotation(model.model.rotary_emb)
