"""DroPE models as native transformers classes, without remote code: `llama_drope` and `qwen2_drope`.

A DroPE checkpoint is a RoPE model whose rotation was nulled (cos=1, sin=0) and which was then recalibrated. The
`attention_type` in its `config.json` names what attention does to queries and keys instead:

=================  ==========================================================================
``nope``           nothing: the base model's attention without rotation (the default)
``qk_norm_nope``   RMSNorm of queries and keys, over all heads together, before the split
``q_norm_nope``    RMSNorm of queries only
``k_norm_nope``    RMSNorm of keys only
=================  ==========================================================================

`softmax_scale`, if present, *replaces* d_head^-0.5; it does not multiply it. The three norm variants store both norms,
the unused one too. Parameter names are the base model's. Format as released with DroPE (arXiv 2512.12167).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, LlamaConfig, Qwen2Config
from transformers.models.llama import modeling_llama
from transformers.models.qwen2 import modeling_qwen2

# The states that each attention_type normalises.
ATTENTION_TYPES: dict[str, str] = {"nope": "", "qk_norm_nope": "qk", "q_norm_nope": "q", "k_norm_nope": "k"}


class NoRotaryEmbedding(nn.Module):
    """The identity rotation: cos=1 and sin=0, in the shape that the base model's rotary module returns."""

    def __init__(self, d_rotary: int) -> None:
        super().__init__()
        self.d_rotary = d_rotary

    def forward(self, x: Tensor, position_ids: Tensor, **_: object) -> tuple[Tensor, Tensor]:
        """Return cos and sin, each [1, pos, d_rotary], the same for all positions."""
        shape = (1, position_ids.shape[-1], self.d_rotary)
        return x.new_ones(shape), x.new_zeros(shape)


def base_angles(config: DroPELlamaConfig | DroPEQwen2Config, d_rotary: int) -> tuple[float, ...]:
    """Return the radians by which one position turned each pair in the model that was recalibrated.

    Its rope parameters remain in the configuration, where nothing reads them. Empty if they are for another number of
    dimensions.
    """
    angles: list[float] = modeling_llama.LlamaRotaryEmbedding(config).inv_freq.double().tolist()
    return tuple(angles) if len(angles) == d_rotary // 2 else ()


def rotate(states: Tensor, angles: Tensor) -> Tensor:
    """Rotate states as the base families do, which share one rotation.

    Args:
        states: [pos, d_rotary], of one head.
        angles: [d_rotary / 2], one per pair.

    >>> rotate(torch.tensor([[5.0, 0.0]]), torch.tensor([0.6435])).round().tolist()
    [[4.0, 3.0]]
    """
    angles_by_dimension = torch.cat([angles, angles]).expand(1, len(states), -1)
    rotated, _ = modeling_llama.apply_rotary_pos_emb(
        states[None, None], states[None, None], angles_by_dimension.cos(), angles_by_dimension.sin()
    )
    states_rotated: Tensor = rotated[0, 0]
    return states_rotated


class _NormedAttention(nn.Module):
    """Attention of the norm variants: the base class' projections, flat RMSNorms, no rotation."""

    # Set by the base class.
    config: DroPELlamaConfig | DroPEQwen2Config
    layer_idx: int
    head_dim: int
    scaling: float
    attention_dropout: float
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear

    def _add_norms(self, config: DroPELlamaConfig | DroPEQwen2Config, norm: type[nn.Module]) -> None:
        self.normed = ATTENTION_TYPES[config.attention_type]
        self.q_norm = norm(config.num_attention_heads * self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = norm(config.num_key_value_heads * self.head_dim, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend without rotation; `position_embeddings` are accepted, as the decoder layer passes them, and unused.

        transformers 5.24 names the cache `cache`, and `past_key_values` before.
        """
        cache = past_key_values if cache is None else cache
        q, k, v = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        if "q" in self.normed:
            q = self.q_norm(q)
        if "k" in self.normed:
            k = self.k_norm(k)
        batch_and_pos = hidden_states.shape[:-1]
        q, k, v = (states.view(*batch_and_pos, -1, self.head_dim).transpose(1, 2) for states in (q, k, v))
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        if getattr(self, "sliding_window", None) is not None:
            kwargs["sliding_window"] = self.sliding_window
        attend = modeling_llama.ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, modeling_llama.eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        attended, weights = attend(
            self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(attended.reshape(*batch_and_pos, -1).contiguous()), weights


class DroPELlamaAttention(_NormedAttention, modeling_llama.LlamaAttention):
    """Llama attention with flat query and key norms and no rotation."""

    def __init__(self, config: DroPELlamaConfig, layer_idx: int) -> None:
        modeling_llama.LlamaAttention.__init__(self, config, layer_idx)
        self._add_norms(config, modeling_llama.LlamaRMSNorm)


class DroPEQwen2Attention(_NormedAttention, modeling_qwen2.Qwen2Attention):
    """Qwen2 attention with flat query and key norms and no rotation."""

    def __init__(self, config: DroPEQwen2Config, layer_idx: int) -> None:
        modeling_qwen2.Qwen2Attention.__init__(self, config, layer_idx)
        self._add_norms(config, modeling_qwen2.Qwen2RMSNorm)


class _DroPEConfig:
    """The fields that DroPE adds to a base configuration, and their checks."""

    def __post_init__(self: Any, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]
        if self.attention_type not in ATTENTION_TYPES:
            attention_types = ", ".join(ATTENTION_TYPES)
            raise ValueError(f"attention_type is {self.attention_type!r}; DroPE knows {attention_types}")
        if self.softmax_scale is not None and not self.softmax_scale > 0:
            raise ValueError(f"softmax_scale is {self.softmax_scale!r}; it must be above 0, or left out")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, without a `softmax_scale` of None, since readers would mistake null for a scale."""
        fields: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        if fields.get("softmax_scale") is None:
            fields.pop("softmax_scale", None)
        return fields


class DroPELlamaConfig(_DroPEConfig, LlamaConfig):
    """A Llama configuration with `attention_type` and an optional absolute `softmax_scale`."""

    model_type = "llama_drope"
    attention_type: str = "nope"
    softmax_scale: float | None = None


class DroPEQwen2Config(_DroPEConfig, Qwen2Config):
    """A Qwen2 configuration with `attention_type` and an optional absolute `softmax_scale`."""

    model_type = "qwen2_drope"
    attention_type: str = "nope"
    softmax_scale: float | None = None


def _drop_rotation(
    inner: modeling_llama.LlamaModel | modeling_qwen2.Qwen2Model,
    config: DroPELlamaConfig | DroPEQwen2Config,
    attention: type[_NormedAttention],
) -> None:
    """Null the rotation of a newly built base model and give it the attention that its config names."""
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    inner.rotary_emb = NoRotaryEmbedding(d_head)
    for index, layer in enumerate(inner.layers):
        if ATTENTION_TYPES[config.attention_type]:
            layer.self_attn = attention(config, index)
        if config.softmax_scale is not None:
            layer.self_attn.scaling = config.softmax_scale


class DroPELlamaModel(modeling_llama.LlamaModel):
    """The Llama decoder without rotation."""

    config_class = DroPELlamaConfig

    def __init__(self, config: DroPELlamaConfig) -> None:
        super().__init__(config)
        _drop_rotation(self, config, DroPELlamaAttention)
        self.post_init()


class DroPELlamaForCausalLM(modeling_llama.LlamaForCausalLM):
    """The Llama language model without rotation.

    >>> config = DroPELlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
    ...     num_attention_heads=2, num_key_value_heads=1, attention_type="qk_norm_nope")
    >>> model = DroPELlamaForCausalLM(config).eval()
    >>> model(torch.tensor([[1, 2, 3]])).logits.shape
    torch.Size([1, 3, 32])
    """

    config_class = DroPELlamaConfig

    def __init__(self, config: DroPELlamaConfig) -> None:
        super().__init__(config)
        _drop_rotation(self.model, config, DroPELlamaAttention)
        self.post_init()


class DroPEQwen2Model(modeling_qwen2.Qwen2Model):
    """The Qwen2 decoder without rotation."""

    config_class = DroPEQwen2Config

    def __init__(self, config: DroPEQwen2Config) -> None:
        super().__init__(config)
        _drop_rotation(self, config, DroPEQwen2Attention)
        self.post_init()


class DroPEQwen2ForCausalLM(modeling_qwen2.Qwen2ForCausalLM):
    """The Qwen2 language model without rotation."""

    config_class = DroPEQwen2Config

    def __init__(self, config: DroPEQwen2Config) -> None:
        super().__init__(config)
        _drop_rotation(self.model, config, DroPEQwen2Attention)
        self.post_init()
