"""Tiny mixtures of experts, with many experts so that scores often nearly tie."""

from __future__ import annotations

from typing import Any

import torch

_COMMON: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "num_experts_per_tok": 4,
}
_N_EXPERTS = 32
# Model type: fields that differ from the common ones.
_FIELDS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": _N_EXPERTS},
    "qwen2_moe": {
        "num_experts": _N_EXPERTS,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "qwen3_moe": {"num_experts": _N_EXPERTS, "moe_intermediate_size": 16, "head_dim": 8},
    "gpt_oss": {
        "num_local_experts": _N_EXPERTS,
        "head_dim": 8,
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "olmoe": {"num_experts": _N_EXPERTS},
    "granitemoe": {"num_local_experts": _N_EXPERTS},
    "glm4_moe": {
        "n_routed_experts": _N_EXPERTS,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "n_group": 4,
        "topk_group": 2,
    },
    "deepseek_v3": {
        "n_routed_experts": _N_EXPERTS,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "n_group": 4,
        "topk_group": 2,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "phimoe": {"num_local_experts": _N_EXPERTS, "num_experts_per_tok": 2},
}

MIXTURES = tuple(_FIELDS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tiny_mixture(
    model_type: str, dtype: torch.dtype = torch.float32, *, seed: int = 0, **overrides: Any
) -> Any:
    """Return a random model of this type, with attention and routing far from uniform."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **{**_COMMON, **_FIELDS[model_type], **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
                if "norm" not in name:
                    parameter.mul_(12.0 if "q_proj" in name or "k_proj" in name else 4.0)
    return model.to(dtype).eval()
