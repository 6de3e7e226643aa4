"""Tiny random models of several modalities, whose text model the lens loads."""

from __future__ import annotations

from typing import Any

import torch

_TEXT: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_LLAMA = _TEXT | {"model_type": "llama"}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
_QWEN_VISION = {"depth": 2, "num_heads": 4, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32}
_TOKENS = {"image_token_id": 66, "video_token_id": 65, "vision_start_token_id": 64, "vision_end_token_id": 63}

# Model type: the text configuration, the vision configuration, further fields, and the class of the text model.
TOWERS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = {
    "llava": (
        _LLAMA,
        _VISION | {"model_type": "clip_vision_model"},
        {"image_token_index": 66},
        "LlamaForCausalLM",
    ),
    "mistral3": (
        _TEXT | {"model_type": "mistral", "head_dim": 8},
        _VISION | {"model_type": "pixtral", "head_dim": 8},
        {"image_token_index": 66},
        "MistralForCausalLM",
    ),
    "gemma3": (
        _TEXT | {"head_dim": 8, "sliding_window": 7},
        _VISION,
        {"mm_tokens_per_image": 4, "image_token_index": 66},
        "Gemma3ForCausalLM",
    ),
    "gemma3n": (
        _TEXT
        | {
            "head_dim": 8,
            "sliding_window": 7,
            "vocab_size_per_layer_input": 67,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 0,
            "laurel_rank": 4,
            "activation_sparsity_pattern": [0.0, 0.0],
        },
        {"hidden_size": 32, "vocab_offset": 67},
        {"audio_config": {"hidden_size": 32, "conf_num_hidden_layers": 1, "vocab_offset": 195}},
        "Gemma3nForCausalLM",
    ),
    "gemma4": (
        _TEXT
        | {
            "head_dim": 8,
            "global_head_dim": 8,
            "sliding_window": 7,
            "vocab_size_per_layer_input": 67,
            "hidden_size_per_layer_input": 8,
        },
        _VISION | {"head_dim": 8, "num_key_value_heads": 4, "position_embedding_size": 64},
        {"image_token_id": 66, "video_token_id": 65, "audio_token_id": 64, "audio_config": None},
        "Gemma4ForCausalLM",
    ),
    "llama4": (
        _TEXT
        | {
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
            "attention_chunk_size": 64,
            "no_rope_layers": [1, 0],
        },
        {
            "hidden_size": 32,
            "intermediate_size": 128,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "image_size": 28,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
        },
        {"image_token_index": 66},
        "Llama4ForCausalLM",
    ),
    "qwen2_5_vl": (_TEXT | _MROPE, _QWEN_VISION, _TOKENS, "Qwen2_5_VLForConditionalGeneration"),
    "qwen3_vl": (
        _TEXT | _MROPE | {"head_dim": 8},
        _QWEN_VISION | {"deepstack_visual_indexes": [1], "num_position_embeddings": 16},
        _TOKENS,
        "Qwen3VLForConditionalGeneration",
    ),
    # Its text class would scale the logits, which the whole one does not.
    "aya_vision": (
        _TEXT
        | {
            "model_type": "cohere2",
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        _VISION | {"model_type": "siglip_vision_model"},
        {"alignment_intermediate_size": 32, "image_token_index": 66},
        "AyaVisionForConditionalGeneration",
    ),
    "internvl": (_TEXT | {"model_type": "qwen2"}, _VISION, {"image_token_id": 66}, "Qwen2ForCausalLM"),
    "idefics3": (_LLAMA, _VISION, {"image_token_id": 66}, "LlamaForCausalLM"),
}


def tiny_tower(model_type: str, *, seed: int = 0, **overrides: Any) -> Any:
    """Return a random model of several modalities, float32, in eval mode.

    Args:
        overrides: fields of the text configuration.
    """
    import transformers

    from phaselens.lens import text_towers

    text, vision, fields, _ = TOWERS[model_type]
    config_class = transformers.CONFIG_MAPPING[model_type]
    config = config_class(text_config=text | overrides, vision_config=vision, **fields)
    model_class = text_towers.whole_class(config)
    if model_type == "gemma3n":
        # Its vision tower needs the package timm.
        model_class = text_towers._text_only(model_class)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class._from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model
