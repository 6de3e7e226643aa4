"""Tiny configurations of any config class: small widths, few layers, and a layer of each kind that the family has.

The rules go by the names of fields, so they also apply to config classes that a newer transformers adds. `_OF_TYPE`
holds what a model type needs beyond them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

D_MODEL, N_HEADS, D_HEAD, D_VOCAB, N_POSITIONS, WINDOW = 32, 4, 8, 67, 128, 7
#: Ids that texts use. Special tokens of a configuration (images, audio) get ids above them.
TEXT_IDS = range(4, 58)
_MOST_LAYERS = 6

# Sizes of fields by the pattern of their whole name; the first pattern that matches decides.
_SIZES: tuple[tuple[str, int], ...] = (
    (r".*vocab(ulary)?_size.*|.*hash_byte_group_vocab|pronunciation_vocab_size", D_VOCAB),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_target_positions|context_length", N_POSITIONS),
    (r"max_source_positions|model_max_length", N_POSITIONS),
    (r"sliding_window(_size)?|window_size|attention_window_size|local_attention_window_len", WINDOW),
    (r"local_attention", 2 * WINDOW),
    # Longer than the texts, since longer ones are refused.
    (r"attention_chunk_size|index_topk|keep_window_size|max_inference_chunksize", 32),
    (r"block_size|index_block_size", 8),
    (r".*(sparse|moe)_(layer_)?(step|interval|freq)", 1),
    (r"sliding_window_pattern|.*_every_n_layers|.*_interval|.*_period|layer_group_size", 2),
    (r"(attn|expert)_layer_offset|n_layers_per_attn_res_block", 1),
    (r"(num|n)_(routed_|local_)?experts|moe_num_experts|zero_expert_num", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts|index_topk_blocks", 2),
    (r"topk_group|first_k_dense_replace|num_dense_layers|num_kv_shared_layers|moe_layer_start_index", 1),
    (r"(moe|expert|shared)_.*(intermediate|hidden)_size|shared_.*intermediate_size", 16),
    (r".*intermediate_size.*|.*ffn_dim|ffn_hidden_size|d_inner|dff|dim_ff|n_inner|feed_forward_size", 48),
    (r"qk_rope_head_dim|rotary_dim", 4),
    (r".*lora_rank|.*_rank|d_rel|.*lowrank", 8),
    (r"linear_num_key_heads|index_n_heads|n_group|num_expert_group", 2),
    (r".*num_key_value_heads|.*num_kv_heads|num_query_groups", 2),
    (r"mamba_n(um)?_heads|(mamba_)?num_heads_ssm", 2 * D_MODEL // D_HEAD),
    (r".*attention_heads|n_heads?|.*num_heads|linear_num_value_heads", N_HEADS),
    (r".*head_dim|dim_head|d_head|kv_channels|attention_head_size|mamba_d_head|mamba_headdim", D_HEAD),
    (r".*state(_size)?", 8),
    (r"mamba_d_ssm|attention_hidden_size", 2 * D_MODEL),
    (r"(mamba_)?n_?groups|o_groups", 2),
    (r".*chunk_size|.*chunk_length", 8),
    (r".*hidden_size(_global)?|.*d_model|n_embd|lru_width|.*proj_dim|adapter_.*", D_MODEL),
    (r"(input_)?embedding_size", D_MODEL // 2),
    (r".*embed(ding)?_dim|emb_dim|.*embedding_size", D_MODEL),
    (r"image_size", 28),
    (r"patch_size", 14),
)  # fmt: skip
_N_LAYERS = re.compile(r"(num_hidden_|num_decoder_|decoder_|num_|n_)layers?|num_blocks|num_layers_per_stack")
_OTHER_LAYERS = re.compile(r"(num_)?encoder_layers|depth")
_PERIOD = re.compile(r".*(period|interval|every_n_layers|_pattern|layer_group_size|sparse_step)")
_TOKEN_ID = re.compile(r".*_tok(en)?_(id|index)|(pad|unk|mask|bos|eos)_index")
_KEPT = re.compile(
    r".*(theta|seed|eps|factor|scale|init|std|width|radius|num_labels|pretraining_tp|ngram_size).*"
)
_SET_WITHOUT_DEFAULT = re.compile(r"head_dim|num_key_value_heads|num_experts_per_tok|n_routed_experts")
# Numbers of anything not listed above are at most this.
_LARGEST = 16

_GEMMA4 = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_hidden_layers": 4,
    "global_head_dim": 2 * D_HEAD,
}
_SHARED_KEYS = {"num_kv_shared_layers": 2, "vocab_size_per_layer_input": D_VOCAB}
_ASSISTANT = {
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "global_head_dim": 2 * D_HEAD,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
}
_DOTS3 = {
    "sliding_window": WINDOW,
    "swa_num_attention_heads": N_HEADS // 2,
    "swa_num_key_value_heads": N_HEADS // 2,
    "swa_q_lora_rank": 8,
    "swa_kv_lora_rank": 8,
    "swa_head_dim": 12,
    "swa_qk_nope_head_dim": D_HEAD,
    "swa_v_head_dim": D_HEAD,
    "head_dim": 12,
}
_QWEN4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": D_HEAD,
    "indexer_budget": 32,
    "indexer_compress_ratio": 2,
    "ple_layer_ids": [1],
    "ple_embed_dim": D_MODEL,
    "heads_per_ngram": 2,
    "eos_token_id": 1,
}
_SLIDING_AND_FULL = {"layer_types": ["sliding_attention", "full_attention"]}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_GEMMA3N = {
    **_SHARED_KEYS,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_hidden_layers": 4,
    "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
}

# What a model type needs beyond the rules; the fields of a part (`text_config`) are a dict, with the
# part's `model_type` if it isn't the default.
_OF_TYPE: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere2_moe": {"mlp_layer_types": ["dense", "sparse"]},
    "cohere_compass_text": {
        **_SLIDING_AND_FULL,
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"moe_top_k": 2},
    },
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {"text_config": _DOTS3},
    "dots3_note_text": _DOTS3,
    "gemma3n": {"text_config": _GEMMA3N},
    "gemma3n_text": _GEMMA3N,
    "gemma4": {"text_config": _GEMMA4 | _SHARED_KEYS},
    "gemma4_text": _GEMMA4 | _SHARED_KEYS,
    "gemma4_assistant": {"text_config": {"model_type": "gemma4_text"} | _ASSISTANT},
    "gemma4_unified": {"text_config": _GEMMA4},
    "gemma4_unified_text": _GEMMA4,
    "gemma4_unified_assistant": {"text_config": _ASSISTANT},
    "flint": {"mlp_only_layers": [0]},
    "glm_moe_dsa": {"indexer_types": ["full", "shared"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "laguna": {**_SLIDING_AND_FULL, "num_attention_heads_per_layer": [N_HEADS, N_HEADS // 2]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 4},
    "mamba2": {"num_heads": 2 * D_MODEL // D_HEAD},
    "mellum": _SLIDING_AND_FULL,
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"]},
    "mllama": {"text_config": {"cross_attention_layers": [1], "num_hidden_layers": 3}},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": {
        "axial_pos_shape": (8, 16),
        "axial_pos_embds_dim": (16, 16),
        "attn_layers": ["local", "lsh"],
    },
    "xlm": {"causal": True},
    # Its kernel needs queries and keys of a width that is a multiple of 64.
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    # Layers with attention share weights, so there must be several.
    "zaya": {"layer_types": ["hybrid", "hybrid_sliding"], "sliding_window": WINDOW},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
}


def model_types() -> tuple[str, ...]:
    """Return every model type that the installed transformers maps to a causal language model, in its order."""
    own_names = set(dir(transformers))  # without the classes that PhaseLens registers
    return tuple(
        model_type
        for model_type, class_name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
        if class_name in own_names
    )


def class_name_of(model_type: str) -> str:
    """Return the name of the model class to which transformers maps a model type."""
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    # A type that was registered at run time stands in no table of names.
    return str(name or MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]].__name__)


def tiny_config(model_type: str) -> PreTrainedConfig:
    """Return a tiny configuration of a model type."""
    return _shrunk(CONFIG_MAPPING[model_type], _OF_TYPE.get(model_type, {}))


def _shrunk(config_class: type[PreTrainedConfig], exceptions: dict[str, Any]) -> PreTrainedConfig:
    """Return a tiny configuration of a class.

    Args:
        exceptions: values of fields that replace those of the rules; of a part (`text_config`), a dict of its fields.
    """
    default = _default_of(config_class)
    declared = {field.name: field.default for field in dataclasses.fields(config_class)}
    fields: dict[str, Any] = {}
    for name, value in declared.items():
        part = vars(default).get(name) if default is not None else None
        if isinstance(exceptions.get(name), dict) and "model_type" in exceptions[name]:
            of_part = dict(exceptions[name])
            fields[name] = _shrunk(CONFIG_MAPPING[of_part.pop("model_type")], of_part)
        elif isinstance(part, PreTrainedConfig):
            fields[name] = _shrunk(type(part), exceptions.get(name, {}))
        elif value is None and _SET_WITHOUT_DEFAULT.fullmatch(name):
            fields[name] = _small(name, D_VOCAB, declared)
        elif isinstance(value, int) and not isinstance(value, bool):
            fields[name] = _small(name, value, declared)
        elif value is False and name == "is_decoder":
            fields[name] = True
    fields |= _layers(default, declared)
    fields |= {
        name: value
        for name, value in exceptions.items()
        if not isinstance(fields.get(name), PreTrainedConfig) or not isinstance(value, dict)
    }
    return config_class(**fields)


def _default_of(config_class: type[PreTrainedConfig]) -> PreTrainedConfig | None:
    """Return the configuration with all defaults; None for a class whose defaults contradict each other."""
    try:
        return config_class()
    except StrictDataclassError:
        return None


def _small(name: str, value: int, declared: dict[str, Any]) -> int:
    """Return the size of a field whose default is `value`."""
    if _KEPT.fullmatch(name):
        return value
    if _TOKEN_ID.fullmatch(name):
        return value if value < TEXT_IDS.start else TEXT_IDS.stop + value % (D_VOCAB - TEXT_IDS.stop)
    if _OTHER_LAYERS.fullmatch(name):
        return min(value, 1)
    is_multi_head = "kv_lora_rank" in declared or value == declared.get("num_attention_heads")
    if re.fullmatch(r"num_(key_value|kv)_heads", name) and is_multi_head:
        return N_HEADS
    size = next((size for pattern, size in _SIZES if re.fullmatch(pattern, name)), _LARGEST)
    return min(size, value)


def _layers(default: PreTrainedConfig | None, declared: dict[str, Any]) -> dict[str, Any]:
    """Return the number of layers, and the fields with a value for each layer, so that every kind of layer occurs."""
    n_default = getattr(default, "num_hidden_layers", None)
    by_layer = {
        name: list(values)
        for name, values in (vars(default) if default is not None else {}).items()
        if not isinstance(declared.get(name, 0), int)
        and isinstance(values, list | tuple)
        and len(values) == n_default
        and _is_kind(values)
    }
    is_periodic = any(_PERIOD.fullmatch(name) for name in declared)
    indices = list(range(4 if is_periodic else 2))
    if by_layer:
        first_by_kind: dict[tuple[Any, ...], int] = {}
        for index in range(n_default):
            first_by_kind.setdefault(tuple(values[index] for values in by_layer.values()), index)
        indices = sorted(first_by_kind.values())[:_MOST_LAYERS]
        indices += [index for index in range(n_default) if index not in indices][: max(0, 2 - len(indices))]
    n_layers = {name: len(indices) for name in declared if _N_LAYERS.fullmatch(name)}
    return n_layers | {name: [values[index] for index in indices] for name, values in by_layer.items()}


def _is_kind(values: Sequence[object]) -> bool:
    """Return whether these are one value for each layer, and not the indices of some layers."""
    return (
        not all(isinstance(value, int) and value >= index for index, value in enumerate(values))
        or len(set(values)) < 3
    )
