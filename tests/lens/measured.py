"""Tiny random models of architectures that are served from their measured anatomy."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

_SHAPE = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 8,
}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
RECIPES = {
    "ministral": {"sliding_window": 7, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bart": {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "is_decoder": True},
    "gpt_bigcode": {},
    # One projection for q, k and v; norms and attention in a module of their own.
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48},
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
    },
    "minicpm3": {**_LATENT, "scale_depth": 1.4},
    "deepseek_v2": {**_LATENT, "n_routed_experts": 4, "first_k_dense_replace": 2},
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64, "head_dim": 8},
    "granitemoehybrid": {
        **_MAMBA,
        "layer_types": ["mamba", "attention"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 16,
        "residual_multiplier": 0.22,
    },
    "qwen3_next": {
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "mamba": {"state_size": 8},
    # Layers that rotate and attend in chunks, and layers that do neither, with a temperature by position.
    "llama4_text": {
        "head_dim": 8,
        "attention_chunk_size": 32,
        "no_rope_layers": [1, 0],
        "layer_types": ["chunked_attention", "full_attention"],
        "floor_scale": 8,
        "num_local_experts": 2,
        "intermediate_size_mlp": 48,
        "interleave_moe_layer_step": 2,
        "moe_layers": [1],
    },
    # Latent attention to the keys that an indexer selects.
    "deepseek_v32": {
        **_LATENT,
        "index_topk": 32,
        "index_n_heads": 2,
        "index_head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 2,
    },
    # A residual is not all that its layers receive: an embedding of each token for each layer.
    "gemma4_text": {
        "head_dim": 8,
        "global_head_dim": 16,
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 67,
        "enable_moe_block": False,
    },
}  # fmt: skip


def model_of(model_type: str, dtype: torch.dtype = torch.float32):
    config = AutoConfig.for_model(model_type, **{**_SHAPE, **RECIPES[model_type]})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
        except ValueError:
            model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() >= 2 and not any(part in name for part in ("A_log", "conv", "norm")):
                    parameter.mul_(4.0)
    return model.to(dtype).eval()
