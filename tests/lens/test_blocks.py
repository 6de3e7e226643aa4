"""Blocks without hooks run the model's own modules; blocks with hooks fire all of their points."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformer_lens.model_bridge.generalized_components import LinearBridge

import phaselens
from phaselens.lens.blocks import bridges_in
from phaselens.testing import tiny_model
from tests.lens.conftest import lens_of


def test_no_bridge_inside_a_block_without_hooks_runs(tokens, monkeypatch):
    lens = lens_of("llama-gqa")
    bridge_names: list[str] = []
    forward = LinearBridge.forward
    monkeypatch.setattr(
        LinearBridge,
        "forward",
        lambda self, *a, **k: bridge_names.append(self.name) or forward(self, *a, **k),
    )
    unhooked = lens.stream(tokens)
    assert bridge_names == []
    activations: list[torch.Tensor] = []
    # A block's own two points are outside of it and need no bridges inside.
    lens.stream(tokens, [("blocks.0.hook_resid_post", lambda x, hook: activations.append(x))])
    assert (bridge_names, len(activations)) == ([], 1)
    hooked = lens.stream(tokens, [("blocks.1.mlp.hook_pre", lambda x, hook: activations.append(x))])
    assert (len(bridge_names), len(activations)) == (7, 2)  # q, k, v, o, gate, in, out of one layer
    assert torch.equal(unhooked, hooked)


def test_a_torch_hook_on_a_component_counts_as_a_hook(tokens):
    lens = lens_of("llama")
    calls: list[Any] = []
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        handle = getattr(lens.blocks[0].mlp, register)(lambda *arguments: calls.append(arguments) and None)
        lens.stream(tokens)
        handle.remove()
    lens.stream(tokens)
    assert len(calls) == 2


def test_bridges_are_back_in_place_after_an_error(tokens):
    lens = lens_of("llama-gqa")
    expected = lens.stream(tokens)
    layer = lens.blocks[1].original_component
    original = [(name, bridge) for _, name, bridge in bridges_in(layer)]
    assert len(original) == 11  # attention, MLP, two norms and seven projections

    def fail(*_: Any) -> None:
        raise ArithmeticError("in the middle")

    handle = lens.blocks[1].mlp.original_component.act_fn.register_forward_hook(fail)
    with pytest.raises(ArithmeticError, match="in the middle"):
        lens.stream(tokens)
    handle.remove()
    restored = [(name, bridge) for _, name, bridge in bridges_in(layer)]
    assert [name for name, _ in restored] == [name for name, _ in original]
    assert all(
        bridge is original_bridge
        for (_, bridge), (_, original_bridge) in zip(restored, original, strict=True)
    )
    assert torch.equal(lens.stream(tokens), expected)


def test_a_module_that_is_replaced_later_is_the_one_that_runs(tokens):
    lens, model = phaselens.load(tiny_model("llama")), tiny_model("llama")
    lens.stream(tokens)  # fills every cache of the blocks
    lens.blocks[0].mlp.original_component.act_fn = torch.nn.ReLU()
    model.model.layers[0].mlp.act_fn = torch.nn.ReLU()
    with torch.no_grad():
        assert torch.equal(lens.stream(tokens, unembed=True), model(tokens).logits)


def test_a_module_that_is_replaced_in_its_bridge_is_the_one_that_runs(tokens):
    lens = phaselens.load(tiny_model("llama"))
    with_original_module = lens.stream(tokens)
    doubled = torch.nn.Linear(48, 32, bias=False)
    with torch.no_grad():
        doubled.weight.copy_(2 * lens.blocks[0].mlp.out.weight)
    lens.blocks[0].mlp.out.set_original_component(doubled)
    unhooked = lens.stream(tokens)
    hooked = lens.stream(tokens, [("blocks.0.mlp.hook_pre", lambda x, hook: None)])
    assert torch.equal(unhooked, hooked)
    assert not torch.allclose(unhooked, with_original_module)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt-neox"])
def test_a_nulled_rotation_is_nulled_in_blocks_without_hooks(family, tokens):
    lens = phaselens.load(tiny_model(family), positions="nope")
    unhooked = lens.stream(tokens)
    points = [(f"blocks.{layer}.attn.hook_z", lambda x, hook: None) for layer in range(2)]
    assert torch.equal(unhooked, lens.stream(tokens, points))
    assert not torch.allclose(unhooked, lens_of(family).stream(tokens), atol=1e-3)


def test_the_halves_of_a_fused_gate_and_up_projection_can_be_read_and_edited(tokens):
    lens, model = lens_of("phi3"), tiny_model("phi3")
    mlp = model.model.layers[0].mlp
    fused: list[torch.Tensor] = []
    handle = mlp.gate_up_proj.register_forward_hook(lambda module, inputs, output: fused.append(output))
    with torch.no_grad():
        model(tokens)
    handle.remove()
    halves: dict[str, torch.Tensor] = {}
    points = [
        (f"blocks.0.mlp.{name}", lambda x, hook, name=name: halves.__setitem__(name, x))
        for name in ("hook_pre", "hook_pre_linear")
    ]
    with torch.no_grad():
        assert torch.equal(lens.stream(tokens, points, unembed=True), model(tokens).logits)
    assert torch.equal(torch.cat([halves["hook_pre"], halves["hook_pre_linear"]], -1), fused[0])
    edited = lens.stream(tokens, [("blocks.0.mlp.hook_pre", lambda x, hook: x * 0.5)], unembed=True)
    with torch.no_grad():
        mlp.gate_up_proj.weight[: len(mlp.gate_up_proj.weight) // 2] *= 0.5
        torch.testing.assert_close(edited, model(tokens).logits, atol=1e-6, rtol=1e-5)


def test_attention_is_replayed_for_one_residual_only(tokens):
    lens = lens_of("llama-gqa")
    residual = lens.stream(tokens, stop_at_layer=1)
    expected = lens.stream(residual=residual, start_at_layer=1)
    queries: list[torch.Tensor] = []
    attention_outputs: list[torch.Tensor] = []
    hooks = [
        ("blocks.1.attn.hook_q", lambda x, hook: queries.append(x)),
        ("blocks.1.hook_attn_out", lambda x, hook: attention_outputs.append(x)),
    ]
    with lens.attention_replay(1) as replay:
        outputs = [lens.stream(hooks=hooks, residual=residual, start_at_layer=1) for _ in range(3)]
    assert (len(queries), len(attention_outputs)) == (1, 3)
    assert all(torch.equal(output, expected) for output in outputs)
    shorter = residual[:, :5] * 2
    with replay, pytest.raises(phaselens.InputError, match="make a new one for each residual"):
        lens.stream(residual=shorter, start_at_layer=1)
    assert torch.equal(lens.stream(residual=residual, start_at_layer=1), expected)
    with pytest.raises(phaselens.InputError, match=r"attention_replay\(2\): llama-gqa has layers 0 to 1"):
        lens.attention_replay(2)
