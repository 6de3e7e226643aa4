"""A causal language model of a type that transformers does not have, made of its public parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, LlamaConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)


class NovelConfig(LlamaConfig):
    model_type = "novel_lm"


class NovelLook(nn.Module):
    """Attention with keys, values and queries of all heads in one projection, in that order."""

    def __init__(self, config: NovelConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.sizes = [
            config.num_key_value_heads * 8,
            config.num_key_value_heads * 8,
            config.num_attention_heads * 8,
        ]
        self.mix = nn.Linear(config.hidden_size, sum(self.sizes))
        self.write = nn.Linear(config.num_attention_heads * 8, config.hidden_size)

    def forward(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor], attention_mask: Any) -> Tensor:
        key, value, query = (
            part.unflatten(-1, (-1, 8)).transpose(1, 2) for part in self.mix(x).split(self.sizes, dim=-1)
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        attend = AttentionInterface().get_interface(self.config._attn_implementation, eager_attention_forward)
        output, _ = attend(self, query, key, value, attention_mask, scaling=0.5)
        return self.write(output.flatten(-2))


class NovelFloor(nn.Module):
    def __init__(self, config: NovelConfig, layer_idx: int) -> None:
        super().__init__()
        self.calm = LlamaRMSNorm(config.hidden_size)
        self.look = NovelLook(config, layer_idx)
        self.rest = LlamaRMSNorm(config.hidden_size)
        self.think = nn.Sequential(
            nn.Linear(config.hidden_size, 48), nn.SiLU(), nn.Linear(48, config.hidden_size)
        )

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        x = x + 0.7 * self.look(self.calm(x), **options)
        return x + self.think(self.rest(x))


class NovelModel(PreTrainedModel):
    config_class = NovelConfig
    base_model_prefix = "tower"
    _supports_sdpa = _supports_attention_backend = True

    def __init__(self, config: NovelConfig) -> None:
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.floors = nn.ModuleList([NovelFloor(config, index) for index in range(config.num_hidden_layers)])
        self.roof = LlamaRMSNorm(config.hidden_size)
        self.turn = LlamaRotaryEmbedding(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_options: Any,
    ) -> BaseModelOutputWithPast:
        x = self.words(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = torch.arange(x.shape[1], device=x.device)[None]
        mask = create_causal_mask(
            config=self.config, inputs_embeds=x, attention_mask=attention_mask, past_key_values=None
        )
        turns = self.turn(x, position_ids)
        for floor in self.floors:
            x = floor(x, position_embeddings=turns, attention_mask=mask)
        return BaseModelOutputWithPast(last_hidden_state=self.roof(x))


class NovelForCausalLM(PreTrainedModel):
    config_class = NovelConfig
    base_model_prefix = "tower"
    _supports_sdpa = _supports_attention_backend = True

    def __init__(self, config: NovelConfig) -> None:
        super().__init__(config)
        self.tower = NovelModel(config)
        self.speak = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.tower.words

    def get_output_embeddings(self) -> nn.Module:
        return self.speak

    def forward(self, input_ids: Tensor | None = None, **options: Any) -> CausalLMOutputWithPast:
        return CausalLMOutputWithPast(logits=self.speak(self.tower(input_ids, **options).last_hidden_state))
