"""The step between the heads' outputs and the output projection: none, a gate, a norm, or another, measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from phaselens.lens.components import attention_layers, probe
from phaselens.lens.points import Hook, HookFunction, in_layer

if TYPE_CHECKING:
    from phaselens.lens.bridge import HookedTransformer


def read_head_outputs(lens: HookedTransformer) -> tuple[str, ...]:
    """Return the step of each layer between the heads' outputs and the output projection; see `ModelInfo.head_outputs`.

    Random numbers, half of them zero, replace the heads' outputs. A factor of each entry, whatever it depends on,
    leaves exactly those at zero.
    """
    n_layers = len(lens.blocks)
    attentions = attention_layers(lens)
    attended: dict[int, Tensor] = {}
    inputs: dict[int, Tensor] = {}
    generator = torch.Generator().manual_seed(0)

    def put(layer: int) -> HookFunction:
        def replace(value: Tensor, hook: object) -> Tensor:
            values = torch.randn(value.shape, generator=generator)
            values *= torch.rand(value.shape, generator=generator) < 0.5
            attended[layer] = values.to(value.device, value.dtype)
            return attended[layer]

        return replace

    def keep(layer: int) -> HookFunction:
        return lambda value, hook: inputs.__setitem__(layer, value)

    hooks: list[Hook] = []
    for layer in range(n_layers):
        if layer not in attentions:
            continue
        hooks.append((in_layer(layer, "attn.hook_attended"), put(layer)))
        if lens.find_hook(in_layer(layer, "attn.hook_z")) is not None:
            hooks.append((in_layer(layer, "attn.hook_z"), keep(layer)))
    tokens = torch.zeros((1, 2), dtype=torch.long, device=lens.device)
    probe(lens, tokens, hooks)
    relations = []
    for layer in range(n_layers):
        if layer not in attentions:
            relations.append("none")
            continue
        head_output, projected = attended[layer], inputs.get(layer)
        if projected is None or projected.numel() != head_output.numel():
            relations.append("mixed")
            continue
        projected = projected.reshape(head_output.shape)
        is_same = torch.equal(projected, head_output)
        keeps_zeros = bool((projected[head_output == 0] == 0).all())
        relations.append("same" if is_same else "scaled" if keeps_zeros else "mixed")
    return tuple(relations)


def read_gates(lens: HookedTransformer, head_outputs: Sequence[str]) -> tuple[int, ...]:
    """Return the layers in which a gate multiplies the heads' outputs; see `ModelInfo.gates`.

    Only a factor that does not depend on the heads' outputs doubles with them: a gate does, a norm does not. One layer
    of each class of attention modules is measured.
    """
    attentions = attention_layers(lens)
    has_gate: dict[type, bool] = {}
    gates = []
    for layer, step in enumerate(head_outputs):
        if step != "scaled":
            continue
        module_class = type(attentions[layer].original_component)
        if module_class not in has_gate:
            single, double = (_projected(lens, layer, factor) for factor in (1.0, 2.0))
            has_gate[module_class] = torch.equal(double, 2.0 * single)
        if has_gate[module_class]:
            gates.append(layer)
    return tuple(gates)


def _projected(lens: HookedTransformer, layer: int, factor: float) -> Tensor:
    """Return the output projection's input in a layer whose heads' outputs are random numbers times `factor`."""
    projected: list[Tensor] = []

    def put(value: Tensor, hook: object) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return (factor * torch.randn(value.shape, generator=generator)).to(value.device, value.dtype)

    hooks: list[Hook] = [
        (in_layer(layer, "attn.hook_attended"), put),
        (in_layer(layer, "attn.hook_z"), lambda value, hook: projected.append(value.clone())),
    ]
    probe(lens, torch.zeros((1, 2), dtype=torch.long, device=lens.device), hooks)
    return projected[0]
