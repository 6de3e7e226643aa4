"""A random Llama as a GGUF file, and the same model in transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf")

D_MODEL, N_HEADS, N_KV_HEADS, D_MLP, N_LAYERS, N_CTX = 64, 4, 2, 96, 2, 64
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = torch.tensor([[1, 5, 9, 30, 12, 7, 44, 21]])


def _interleaved(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """Rows of a query or key projection in the order of GGUF files of Llama models."""
    return weight.reshape(n_heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path, divisors: np.ndarray | None = None, fields: dict[str, str | float | int] | None = None
) -> dict[str, torch.Tensor]:
    """Write a random Llama with matrices in Q4_1; return its dequantised weights under transformers' names.

    Args:
        divisors: of the rotary frequencies, as Llama 3.1 has them.
        fields: more metadata.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    rng = np.random.default_rng(0)
    vocabulary = [*SPECIAL, *sorted(ByteLevel.alphabet()), "ab"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(N_CTX)
    writer.add_embedding_length(D_MODEL)
    writer.add_block_count(N_LAYERS)
    writer.add_feed_forward_length(D_MLP)
    writer.add_head_count(N_HEADS)
    writer.add_head_count_kv(N_KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(D_MODEL // N_HEADS)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(vocabulary) - len(SPECIAL)))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for key, value in (fields or {}).items():
        add_field = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint16}[type(value)]
        add_field(key, value)
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", divisors.astype(np.float32))
    weights: dict[str, torch.Tensor] = {}

    def add(gguf_name: str, name: str, *shape: int, n_heads: int | None = None) -> None:
        values = rng.normal(1.0 if len(shape) == 1 else 0.0, 0.2, size=shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(gguf_name, values)
            weights[name] = torch.from_numpy(values)
            return
        q4_1 = gguf.GGMLQuantizationType.Q4_1
        # Quantisation works along rows, so it commutes with their order.
        dequantised = gguf.quants.dequantize(gguf.quants.quantize(values, q4_1), q4_1)
        stored = values if n_heads is None else _interleaved(values, n_heads)
        writer.add_tensor(gguf_name, gguf.quants.quantize(stored, q4_1), raw_dtype=q4_1)
        weights[name] = torch.from_numpy(dequantised.copy())

    add("token_embd.weight", "model.embed_tokens.weight", len(vocabulary), D_MODEL)
    add("output_norm.weight", "model.norm.weight", D_MODEL)
    d_kv = D_MODEL // N_HEADS * N_KV_HEADS
    for layer in range(N_LAYERS):
        source, target = f"blk.{layer}", f"model.layers.{layer}"
        add(f"{source}.attn_norm.weight", f"{target}.input_layernorm.weight", D_MODEL)
        add(f"{source}.ffn_norm.weight", f"{target}.post_attention_layernorm.weight", D_MODEL)
        add(f"{source}.attn_q.weight", f"{target}.self_attn.q_proj.weight", D_MODEL, D_MODEL, n_heads=N_HEADS)
        add(f"{source}.attn_k.weight", f"{target}.self_attn.k_proj.weight", d_kv, D_MODEL, n_heads=N_KV_HEADS)
        add(f"{source}.attn_v.weight", f"{target}.self_attn.v_proj.weight", d_kv, D_MODEL)
        add(f"{source}.attn_output.weight", f"{target}.self_attn.o_proj.weight", D_MODEL, D_MODEL)
        add(f"{source}.ffn_gate.weight", f"{target}.mlp.gate_proj.weight", D_MLP, D_MODEL)
        add(f"{source}.ffn_up.weight", f"{target}.mlp.up_proj.weight", D_MLP, D_MODEL)
        add(f"{source}.ffn_down.weight", f"{target}.mlp.down_proj.weight", D_MODEL, D_MLP)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def same_model(weights: dict[str, torch.Tensor], **fields: Any) -> Any:
    """Return the model that `write_gguf` describes, built from the dequantised weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(weights["model.embed_tokens.weight"]),
        hidden_size=D_MODEL,
        intermediate_size=D_MLP,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=N_HEADS,
        num_key_value_heads=N_KV_HEADS,
        max_position_embeddings=N_CTX,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        **{"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}, **fields},
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict(weights, strict=False)
    return model.eval()
