"""Weights reproduce their modules' products or are refused; the step before the output projection is measured."""

from __future__ import annotations

import functools

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

import phaselens
from phaselens.errors import InputError
from phaselens.lens import run_checks
from phaselens.testing import tiny_model
from tests.lens.quantised import Curved, Normed, Packed

NAMES = ("attn.W_Q", "attn.W_K", "attn.W_V", "attn.W_O", "mlp.W_in", "mlp.W_gate", "mlp.W_out")
TOKENS = torch.randint(2, 67, (2, 12), generator=torch.Generator().manual_seed(3))


def replaced(make, dtype=torch.float64, family="llama-gqa"):
    """Return a tiny model whose output projections are made by `make`."""
    model = tiny_model(family, dtype=dtype)
    for layer in model.model.layers:
        layer.self_attn.o_proj = make(layer.self_attn.o_proj)
    return model


def both_sides(lens, tokens=TOKENS):
    """Return each layer's input of the output projection, [batch, pos, head, d_head], and output of attention."""
    activations = {}
    points = [
        f"blocks.{layer}.attn.{name}"
        for layer in range(lens.info.n_layers)
        for name in ("hook_z", "hook_out")
    ]
    lens.stream(
        tokens, [(point, lambda value, hook: activations.__setitem__(hook.name, value)) for point in points]
    )
    by_layer = list(activations.values())
    return list(zip(by_layer[::2], by_layer[1::2], strict=True))


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2", "phi3", "gpt-neox", "gpt-oss"])
def test_every_projection_reproduces_its_module(family):
    """The hook points at both ends of each projection give its input and its output."""
    lens = phaselens.load(tiny_model(family, dtype=torch.float64), label=family)
    ends = {
        "attn.W_Q": ("attn.hook_in", "attn.hook_q"),
        "attn.W_K": ("attn.hook_in", "attn.hook_k"),
        "attn.W_V": ("attn.hook_in", "attn.hook_v"),
        "attn.W_O": ("attn.hook_z", "attn.hook_out"),
        "mlp.W_in": ("mlp.hook_in", "mlp.in.hook_out"),
        "mlp.W_gate": ("mlp.hook_in", "mlp.gate.hook_out"),
        "mlp.W_out": ("mlp.out.hook_in", "mlp.hook_out"),
    }
    checked = 0
    for name, (start, end) in ends.items():
        if family == "gpt-oss" and name.startswith("mlp"):
            with pytest.raises(InputError, match="no weight"):
                lens.weight_of(0, name)
            continue
        if name == "mlp.W_gate" and family in ("gpt2", "gpt-neox"):
            continue
        activations = {}
        hooks = [
            (
                f"blocks.0.{point}",
                lambda value, hook, point=point, store=activations: store.__setitem__(point, value),
            )
            for point in (start, end)
        ]
        lens.stream(TOKENS, hooks)
        projection, weight = lens.projection_of(0, name), lens.weight_of(0, name)
        assert torch.equal(projection.weight, weight)
        inputs, expected = activations[start], activations[end].flatten(2)
        equation = {"attn.W_O": "bphd,hdm->bpm"}.get(
            name, "bpm,hmd->bphd" if weight.dim() == 3 else "bpi,io->bpo"
        )
        product = torch.einsum(equation, inputs, weight).flatten(2) + projection.bias
        torch.testing.assert_close(product, expected, atol=1e-9, rtol=0)
        checked += 1
    assert checked >= 4


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_packed_weights_and_rounded_inputs_reproduce_the_module(dtype):
    lens = phaselens.load(replaced(Packed, dtype))
    limit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for layer, (z, output) in enumerate(both_sides(lens)):
        projection = lens.projection_of(layer, "attn.W_O")
        module = lens.blocks[layer].attn.o.original_component
        assert projection.rounding == "8-bit integers"
        dense = module.dense.T.unflatten(0, (4, 8))
        torch.testing.assert_close(projection.weight, dense, atol=1e-2 * float(dense.max()), rtol=0)
        product = torch.einsum("bphd,hdm->bpm", projection.multiplied(z).double(), projection.weight.double())
        assert (product - output).abs().max() <= limit * output.abs().max()
        with pytest.raises(
            InputError, match=r"layer \d rounds its input to 8-bit integers .* use projection"
        ):
            lens.weight_of(layer, "attn.W_O")


def test_packed_weights_with_plain_inputs_are_a_plain_weight():
    lens = phaselens.load(replaced(functools.partial(Packed, round_inputs=False)))
    module = lens.blocks[1].attn.o.original_component
    expected = module.dense.T.unflatten(0, (4, 8))
    torch.testing.assert_close(lens.weight_of(1, "attn.W_O"), expected, atol=1e-12, rtol=0)


def test_a_norm_inside_the_projection_is_applied_before_the_product():
    lens = phaselens.load(replaced(Normed))
    for layer, (z, output) in enumerate(both_sides(lens)):
        projection = lens.projection_of(layer, "attn.W_O")
        product = torch.einsum("bphd,hdm->bpm", projection.multiplied(z), projection.weight)
        torch.testing.assert_close(product, output, atol=1e-9, rtol=1e-9)
    with pytest.raises(InputError, match="norms its input before it multiplies"):
        lens.weight_of(0, "attn.W_O")


def test_an_adapter_is_part_of_the_weight():
    model = tiny_model("llama-gqa", dtype=torch.float64)
    stored = model.model.layers[0].self_attn.o_proj.weight.detach().clone()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False), model)
    lens = phaselens.load(model.to(torch.float64).eval())
    weight = lens.weight_of(0, "attn.W_O")
    assert (weight.flatten(0, 1).T - stored).abs().max() > 0.01
    z, output = both_sides(lens)[0]
    torch.testing.assert_close(torch.einsum("bphd,hdm->bpm", z, weight), output, atol=1e-5, rtol=0)


def test_a_module_that_is_not_a_product_is_refused_with_the_reason():
    lens = phaselens.load(replaced(lambda linear: Curved(32, 32, bias=False, dtype=torch.float64)))
    with pytest.raises(
        InputError, match=r"attn.W_O of layer 1 \(Curved\) does not multiply its input by a weight"
    ):
        lens.weight_of(1, "attn.W_O")


@pytest.mark.slow
def test_other_weights_are_returned_as_stored_and_packed_ones_refused():
    model = tiny_model("llama-gqa")
    lens = phaselens.load(model)
    assert lens.weight_of(0, "ln1.w").shape == (32,)
    with pytest.raises(InputError, match=r"no weight 'attn\.W_X' in layer 0"):
        lens.weight_of(0, "attn.W_X")
    packed = phaselens.load(replaced(Packed, torch.float32))
    with pytest.raises(InputError, match=r"stored as torch.uint8, which is not what the model computes with"):
        packed.weight_of(0, "attn.o.weight")


class _Mixing(nn.Module):
    def forward(self, states):
        return states - states.mean(-1, keepdim=True)


@pytest.mark.slow
def test_the_step_before_the_output_projection_is_measured():
    assert phaselens.load(tiny_model("gpt2")).info.head_outputs == ("same", "same")
    assert phaselens.load(tiny_model("bitnet", dtype=torch.float64)).info.head_outputs == ("scaled", "scaled")
    model = tiny_model("bitnet", dtype=torch.float64)
    model.model.layers[1].self_attn.attn_sub_norm = _Mixing()
    assert phaselens.load(model).info.head_outputs == ("scaled", "mixed")


@pytest.mark.slow
def test_the_self_check_compares_the_heads_outputs_with_attentions():
    name = "the heads' outputs add up to the output of attention"
    for model in (tiny_model("gpt-neox"), tiny_model("bitnet"), replaced(Packed, torch.float32)):
        (result,) = (result for result in run_checks(phaselens.load(model)) if result.name == name)
        assert result.ok
        assert result.measured < 2e-5
    lens = phaselens.load(tiny_model("llama"))
    attention = lens.blocks[1].attn.original_component
    attention.register_forward_hook(lambda module, args, output: (1.01 * output[0], *output[1:]))
    (result,) = (result for result in run_checks(lens) if result.name == name)
    assert not result.ok
    assert result.measured == pytest.approx(0.01, rel=0.02)


@pytest.mark.slow
def test_a_checkpoint_that_transformer_lens_refuses_loads_without_its_packed_projection():
    model = tiny_model("bitnet", dtype=torch.float64)
    model.model.layers[0].self_attn.o_proj = Packed(model.model.layers[0].self_attn.o_proj)
    lens = phaselens.load(model)
    with pytest.raises(phaselens.InputError, match=r"has no projection 'attn\.W_O' in layer 0"):
        lens.projection_of(0, "attn.W_O")


def test_an_unembedding_without_a_plain_weight_is_refused():
    class MethodWeight(torch.nn.Module):
        """A module whose `weight` is a method, as in torch's quantised modules."""

        def __init__(self, head):
            super().__init__()
            self.packed = head

        def weight(self):
            return self.packed.weight

        def forward(self, inputs):
            return self.packed(inputs)

    model = tiny_model("llama")
    model.lm_head = MethodWeight(model.lm_head)
    with pytest.raises(phaselens.RefusedModel, match="llama: Weight is not a tensor for lm_head"):
        phaselens.load(model)


def test_an_edit_of_head_outputs_reaches_the_norm_after_them():
    """BitNet's norm divides the heads' outputs by less when one of them is zero."""
    from phaselens.plugin import Edit
    from phaselens.runs import applied

    lens = phaselens.load(tiny_model("bitnet", dtype=torch.float64))
    clean = both_sides(lens)[0][0]
    with applied(lens, [Edit("blocks.0.attn.hook_attended", 0.0, heads=[1])]):
        edited = both_sides(lens)[0][0]
    assert not edited[:, :, 1].any()
    ratio = edited[:, :, [0, 2, 3]] / clean[:, :, [0, 2, 3]]
    assert bool((ratio > 1).all())
    # BitNet's norm computes in float32, whatever the model's dtype.
    torch.testing.assert_close(ratio, ratio[..., :1, :1].expand_as(ratio), atol=1e-6, rtol=1e-6)
