"""Models without an adapter in TransformerLens are served from their measured anatomy, exactly."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import phaselens
from phaselens.lens.checks import capture, run_checks
from phaselens.lens.points import STATISTICS
from phaselens.lens.wrapping import has_own_adapter, measure_anatomy
from tests.lens.conftest import by_distance, text

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
}  # fmt: skip
QUICK = ("opt", "minicpm3", "bamba")
WITH_ATTENTION = [name for name in RECIPES if name != "mamba"]
EVERY_RECIPE = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES]


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


@functools.cache
def lens_of(model_type: str):
    return phaselens.load(model_of(model_type), label=model_type)


@pytest.mark.parametrize("model_type", EVERY_RECIPE)
def test_the_full_check_passes(model_type):
    assert not has_own_adapter(model_of(model_type))
    assert [result for result in run_checks(lens_of(model_type)) if not result.ok] == []


@pytest.mark.parametrize("model_type", EVERY_RECIPE)
def test_logits_are_the_models_own(model_type):
    with torch.no_grad():
        expected = model_of(model_type)(text(), use_cache=False).logits
        measured = lens_of(model_type)(text())
    scale = float(expected.abs().max())
    assert float((measured - expected).abs().max()) <= 1e-5 * scale


@pytest.mark.parametrize(
    "model_type",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in WITH_ATTENTION],
)
def test_statistics_equal_the_float64_eager_attention(model_type):
    lens = lens_of(model_type)
    reference = model_of(model_type, torch.float64)
    reference.set_attn_implementation("eager")
    patterns: list[torch.Tensor] = []
    for module in reference.modules():
        if type(module) in {
            type(block.attn.original_component) for block in lens.blocks if "attn" in block._modules
        }:
            module.register_forward_hook(lambda _module, _inputs, output: patterns.append(output[1]))
    with torch.no_grad():
        reference(text(), use_cache=False)
    points = {
        (layer, name): f"blocks.{layer}.attn.{name}"
        for layer in lens.info.attention_layers
        for name in STATISTICS
    }
    _, statistics = capture(lens, text(), points)
    assert len(patterns) == len(lens.info.attention_layers)
    for layer, pattern in zip(lens.info.attention_layers, patterns, strict=True):
        expected = {
            "hook_sink": pattern[..., 0],
            "hook_entropy": torch.special.entr(pattern).sum(-1),
            "hook_received": pattern.sum(-2),
            "hook_distance": by_distance(pattern, 64),
        }
        for name, value in expected.items():
            torch.testing.assert_close(statistics[layer, name].double(), value.double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("model_type", EVERY_RECIPE)
def test_contributions_add_up_to_the_residual(model_type):
    """resid_post is resid_pre and what each part adds, wherever the layer adds them without a norm between."""
    lens = lens_of(model_type)
    names = ("hook_resid_pre", "hook_resid_post", "hook_attn_out", "hook_mixer_out", "hook_mlp_out")
    points = {
        (layer, name): f"blocks.{layer}.{name}"
        for layer in range(lens.info.n_layers)
        for name in names
        if lens.find_hook(f"blocks.{layer}.{name}") is not None
    }
    _, values = capture(lens, text(), points)
    for layer, block in enumerate(lens.blocks):
        if block.find_point("hook_resid_mid") is not None and not block.adds_mid_again():
            continue  # a norm follows each sum
        total = values[layer, "hook_resid_pre"]
        for name in names[2:]:
            total = total + values.get((layer, name), 0.0)
        torch.testing.assert_close(total, values[layer, "hook_resid_post"], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("model_type", EVERY_RECIPE)
def test_ablating_a_contribution_equals_a_module_hook(model_type):
    """The MLP (or the mixer) of layer 1 set to zero: as with plain hooks on the modules that compute it."""
    lens = lens_of(model_type)
    layer = 1
    plan = lens.blocks[layer].plan
    point = "hook_mlp_out" if "hook_mlp_out" not in plan.absent else "hook_mixer_out"
    parts = (
        [plan.parts[term.name] for term in plan.weighted[point]]
        if point in plan.weighted
        else [plan.parts[plan.aliases[point].split(".")[0]]]
    )
    model = model_of(model_type)
    layers = measure_anatomy(model).layers

    def zero(_module: nn.Module, _inputs: object, output: object) -> object:
        return (
            (torch.zeros_like(output[0]), *output[1:])
            if isinstance(output, tuple)
            else torch.zeros_like(output)
        )

    for part in parts:
        layers[layer].get_submodule(part).register_forward_hook(zero)
    with torch.no_grad():
        expected = model(text(), use_cache=False).logits
    measured = lens.stream(
        text(), [(f"blocks.{layer}.{point}", lambda value, hook: torch.zeros_like(value))], unembed=True
    )
    scale = float(expected.abs().max())
    assert float((measured - expected).abs().max()) <= 1e-4 * scale


def test_layers_without_attention_are_named_and_have_no_attention_points():
    info = lens_of("bamba").info
    assert info.kinds == ("mamba", "attention")
    assert info.positions == ("none", "rope")
    assert info.attention_layers == (1,)
    assert lens_of("bamba").find_hook("blocks.0.attn.hook_sink") is None
    assert "no attention" in info.absent["blocks.0.hook_attn_out"]


def test_parts_of_latent_keys_are_named_as_the_reason_for_an_absent_point():
    absent = lens_of("minicpm3").info.absent
    assert "kv_a_proj_with_mqa and kv_b_proj" in absent["blocks.0.attn.hook_k"]


def test_a_model_whose_layers_run_twice_is_refused_with_that_reason():
    model = model_of("ministral")
    body, run_once = model.model, model.model.layers[0].forward

    def run_twice(residual: torch.Tensor, **options: object) -> torch.Tensor:
        body.layers[0].forward = run_once
        return body.layers[0](body.layers[0](residual, **options), **options)

    body.layers[0].forward = run_twice
    with pytest.raises(phaselens.RefusedModel, match="run 3 times"):
        measure_anatomy(model)
