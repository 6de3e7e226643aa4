"""Models without an adapter in TransformerLens are served from their measured anatomy, exactly."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import phaselens
from phaselens.lens.checks import capture, run_checks
from phaselens.lens.points import STATISTICS
from phaselens.lens.wrapping import has_own_adapter, measure_anatomy
from tests.lens.conftest import by_distance, text
from tests.lens.measured import RECIPES, model_of

QUICK = ("opt", "minicpm3", "bamba")
WITH_ATTENTION = [name for name in RECIPES if name != "mamba"]
EVERY_RECIPE = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES]


@functools.cache
def lens_of(model_type: str):
    return phaselens.load(model_of(model_type), label=model_type)


@pytest.mark.slow
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
        if "reads the residual too" in lens.info.absent.get(f"blocks.{layer}.hook_resid_mid", ""):
            continue  # a third part adds to it
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
        try:
            return body.layers[0](body.layers[0](residual, **options), **options)
        finally:
            body.layers[0].forward = run_twice

    body.layers[0].forward = run_twice
    with pytest.raises(phaselens.RefusedModel, match="run 3 times"):
        measure_anatomy(model)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama4_text", "deepseek_v32"])
def test_texts_beyond_a_chunk_or_the_selected_keys_are_refused(model_type):
    lens = lens_of(model_type)
    assert lens.info.longest == 32
    lens.stream(text(length=32))
    with pytest.raises(phaselens.InputError, match="measured up to 32: beyond, it attends in chunks"):
        lens.stream(text(length=33))


def test_layers_that_rotate_and_layers_that_do_not_are_told_apart():
    assert lens_of("llama4_text").info.positions == ("rope", "nope")
