"""The network: a plain Llama, and the same network with its rotation nulled."""

from __future__ import annotations

import torch
from tools.train_pair.corpus import BOS_ID, EOS_ID
from tools.train_pair.recipe import Recipe
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


class NullRotation(nn.Module):
    """Stands in for the rotary embedding: cos = 1, sin = 0, [1, position, d_head] each."""

    def __init__(self, d_head: int) -> None:
        super().__init__()
        self.d_head = d_head

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ones = torch.ones(1, position_ids.shape[-1], self.d_head, dtype=x.dtype, device=x.device)
        return ones, torch.zeros_like(ones)


def llama_config(recipe: Recipe) -> LlamaConfig:
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


def build(recipe: Recipe) -> LlamaForCausalLM:
    """A Llama with transformers' own initialisation, drawn from `recipe.seed`."""
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(llama_config(recipe))
    model.set_attn_implementation("sdpa")
    return model


def null_rotation(model: LlamaForCausalLM) -> None:
    """Turn a rotary model into its DroPE form in place; weights and their names stay as they are."""
    config = model.config
    model.model.rotary_emb = NullRotation(config.hidden_size // config.num_attention_heads)
