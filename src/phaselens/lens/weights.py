"""What projections multiply by, read from the model's own modules, and what stands before the output projection.

A stored weight is not always what a module multiplies by: it may be packed, scaled, adapted (LoRA), or lie on another
device. So a weight is taken as stored only from a plain linear module; from any other, it is the module's answer to the
basis vectors. Either is then compared with the module on random inputs. A module that rounds its input before it
multiplies (8-bit activations) is linear in the rounded input only, which `Projection.multiplied` gives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from transformers.pytorch_utils import Conv1D

from phaselens.errors import InputError, RefusedModel
from phaselens.lens import families
from phaselens.lens.blocks import own_module
from phaselens.lens.components import probe
from phaselens.lens.precision import LIMITS
from phaselens.lens.projection import ROUNDINGS, Projection

_ATTENTION = {"W_Q": "q", "W_K": "k", "W_V": "v", "W_O": "o"}
_MLP = {"W_in": "in", "W_gate": "gate", "W_out": "out"}
_BASIS = 1024.0
"""Length of the basis vectors, a power of two: large beside the epsilon of a norm inside the module."""
_CHUNK = 1024
"""Basis vectors taken together."""
_PROBES = 8


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class _Part:
    """A projection's module, how to read the projection's own output from the module's, and the shape of its weight."""

    module: Any
    select: Callable[[Tensor], Tensor]
    shaped: Callable[[Tensor], Tensor]

    def __call__(self, inputs: Tensor) -> Tensor:
        # Without hooks of the module where it holds several projections: those fire the hook points of its parts.
        call = self.module if self.select is _unchanged else self.module.forward
        output: Tensor = self.select(call(inputs))
        return output


def projection(lens: Any, layer: int | None, name: str) -> Projection:
    """The projection that TransformerLens calls `blocks.{layer}.{name}`: `attn.W_O`, `mlp.W_in`.

    Raises:
        InputError: where there is none of that name, or no weight reproduces what its module computes; says why.

    >>> import phaselens
    >>> from phaselens.testing import tiny_model
    >>> lens = phaselens.load(tiny_model("llama"))
    >>> tuple(projection(lens, 0, "attn.W_O").weight.shape)
    (4, 8, 32)
    """
    part = _part(lens, layer, name)
    if part is None:
        raise InputError(
            f"{lens.info.label} has no projection {name!r} in layer {layer}; it may have attn.W_Q, W_K, W_V, W_O and "
            "mlp.W_in, W_gate, W_out"
        )
    module = part.module
    label = f"{lens.info.label}: {name} of layer {layer} ({type(module).__name__})"
    embedding = lens.original_model.get_input_embeddings().weight
    plain = _is_plain(module)
    norm = None if plain else getattr(module, "rms_norm", None)
    with torch.no_grad():
        d_in = _d_in(lens, layer, name)
        probes = torch.randn((_PROBES, d_in), generator=torch.Generator().manual_seed(0))
        probes = probes.to(embedding.device, embedding.dtype)
        bias = part(torch.zeros_like(probes[:1]))[0]
        if plain:
            matrix = part.select(module.weight if isinstance(module, Conv1D) else module.weight.T)
        else:
            matrix = _answers(part, d_in, norm, bias)
        output = part(probes)
        normed = probes if norm is None else norm(probes)
        roundings = {"": _unchanged} | ({} if plain else ROUNDINGS)
        gaps = {
            rounding: _gap(rounded(normed), matrix, bias, output) for rounding, rounded in roundings.items()
        }
    rounding = min(gaps, key=lambda name: gaps[name])
    if not gaps[rounding] <= LIMITS[embedding.dtype]:
        raise InputError(
            f"{label} is not a product with a weight, neither of its input nor of its input rounded in a usual way: "
            f"the nearest is off by {gaps[rounding]:.2g} of the largest output; read its output instead"
        )
    return Projection(part.shaped(matrix), bias, rounding, norm)


def _require_layer(lens: Any, layer: int | None) -> None:
    """InputError for a layer that the model does not have; Python would count −1 from the end."""
    n_layers = len(lens.blocks)
    if layer is not None and (isinstance(layer, bool) or layer not in range(n_layers)):
        raise InputError(f"{lens.info.label} has layers 0 to {n_layers - 1}, and no layer {layer!r}")


def weight_of(lens: Any, layer: int | None, name: str) -> Tensor:
    """The weight that TransformerLens calls `blocks.{layer}.{name}`; a projection's reproduces its module.

    Raises:
        InputError: for a name that the model does not have, and for a weight that does not do what its module does.
    """
    if _part(lens, layer, name) is not None:
        served = projection(lens, layer, name)
        if served.is_linear:
            return served.weight
        does = f"rounds its input to {served.rounding}" if served.rounding else "norms its input"
        raise InputError(
            f"{lens.info.label}: the module of {name} in layer {layer} {does} before it multiplies, so that no weight "
            f"reproduces it; use projection({name!r}) of a layer's view or projection_of({layer}, {name!r}) of the "
            "model, which have both"
        )
    target: Any = lens if layer is None else lens.blocks[layer]
    try:
        for step in name.split("."):
            target = getattr(target, step)
    except AttributeError as error:
        raise InputError(f"{lens.info.label} has no weight {name!r} in layer {layer}") from error
    if not isinstance(target, Tensor):
        raise InputError(f"{lens.info.label}: {name!r} in layer {layer} is no weight")
    if not target.is_floating_point():
        raise InputError(
            f"{lens.info.label}: {name!r} in layer {layer} is stored as {target.dtype}, which is not what the model "
            "computes with"
        )
    return target.detach()


def read_head_outputs(lens: Any) -> tuple[str, ...]:
    """By layer, what happens to a head's output before the output projection; see `ModelInfo.head_outputs`.

    Random numbers, half of them zero, are put in place of the heads' outputs. A factor of each entry, whatever it
    depends on, leaves exactly those at zero.
    """
    n_layers = len(lens.blocks)
    attended: dict[int, Tensor] = {}
    inputs: dict[int, Tensor] = {}
    generator = torch.Generator().manual_seed(0)

    def put(layer: int) -> Any:
        def replace(value: Tensor, hook: Any) -> Tensor:
            values = torch.randn(value.shape, generator=generator)
            values *= torch.rand(value.shape, generator=generator) < 0.5
            attended[layer] = values.to(value.device, value.dtype)
            return attended[layer]

        return replace

    def keep(layer: int) -> Any:
        return lambda value, hook: inputs.__setitem__(layer, value)

    hooks = []
    for layer in range(n_layers):
        hooks.append((f"blocks.{layer}.attn.hook_attended", put(layer)))
        if lens.blocks[layer].attn.o is not None:
            hooks.append((f"blocks.{layer}.attn.hook_z", keep(layer)))
    tokens = torch.zeros((1, 2), dtype=torch.long, device=lens.device)
    probe(lens, tokens, hooks)
    kinds = []
    for layer in range(n_layers):
        given, received = attended[layer], inputs.get(layer)
        if received is None or received.numel() != given.numel():
            kinds.append("mixed")
            continue
        received = received.reshape(given.shape)
        zero = given == 0
        same = torch.equal(received, given)
        kinds.append("same" if same else "scaled" if bool((received[zero] == 0).all()) else "mixed")
    return tuple(kinds)


def _part(lens: Any, layer: int | None, name: str) -> _Part | None:
    """The module behind a projection's name, or None where there is no such projection."""
    _require_layer(lens, layer)
    if layer is None or name.count(".") != 1:
        return None
    component_name, weight = name.split(".")
    names = {"attn": _ATTENTION, "mlp": _MLP}.get(component_name, {})
    component = getattr(lens.blocks[layer], component_name, None)
    if weight not in names or component is None or names[weight] not in component.submodules:
        return None
    bridge = getattr(component, names[weight], None)
    if bridge is None or bridge.original_component is None:
        return None
    if component_name == "attn":
        return _attention_part(component, weight, own_module(bridge))
    fused = getattr(component, "fused_attr", None)
    if fused is None or weight == "W_out":
        return _Part(own_module(bridge), _unchanged, _unchanged)
    if not component._is_gate_then_up():
        raise InputError(
            f"{name} of layer {layer}: how gate and up projection lie in the one module is not known"
        )
    half = ("W_gate", "W_in").index(weight)
    whole = own_module(getattr(component.original_component, fused))
    return _Part(whole, lambda both: both.chunk(2, dim=-1)[half], _unchanged)


def _attention_part(attention: Any, weight: str, module: Any) -> _Part:
    config = attention.original_component.config
    n_heads = int(config.num_attention_heads)
    if weight == "W_O":
        return _Part(module, _unchanged, lambda matrix: matrix.unflatten(0, (n_heads, -1)))
    n_out = n_heads if weight == "W_Q" else families.n_kv_heads_of(attention.original_component, config)

    def by_head(matrix: Tensor) -> Tensor:
        return matrix.unflatten(-1, (n_out, -1)).permute(1, 0, 2)

    if "qkv" not in attention.submodules:
        return _Part(module, _unchanged, by_head)
    try:
        layout = families.fused_layout(attention.original_component)
    except RefusedModel as error:
        raise InputError(str(error)) from error
    which = ("W_Q", "W_K", "W_V").index(weight)
    return _Part(own_module(attention.qkv), lambda fused: layout.split(fused)[which].flatten(-2), by_head)


def _d_in(lens: Any, layer: int | None, name: str) -> int:
    """How many numbers a projection takes."""
    if name == "attn.W_O":
        return int(lens.info.n_heads * lens.info.d_head)
    if name != "mlp.W_out":
        return int(lens.info.d_model)
    module = own_module(lens.blocks[layer].mlp.out)
    for attribute in ("in_features", "nx"):
        width = getattr(module, attribute, None)
        if isinstance(width, int):
            return width
    config = lens.original_model.config
    return int(getattr(config, "intermediate_size", None) or 4 * lens.info.d_model)


def _is_plain(module: Any) -> bool:
    """Whether nothing but the weight that the module stores can be in what it computes."""
    weight: Any = getattr(module, "weight", None)
    return (
        type(module) in (nn.Linear, Conv1D)
        and type(weight) in (Tensor, nn.Parameter)
        and weight.is_floating_point()
        and not weight.is_meta
        and not is_parametrized(module)
        and "forward" not in vars(module)
        and not module._forward_hooks
        and not module._forward_pre_hooks
    )


def _answers(part: _Part, d_in: int, norm: Any, bias: Tensor) -> Tensor:
    """The matrix [in, out] that the module multiplies by: what it gives for each basis vector, without its bias."""
    rows = []
    for start in range(0, d_in, _CHUNK):
        index = torch.arange(start, min(start + _CHUNK, d_in), device=bias.device)
        basis = torch.zeros((len(index), d_in), dtype=bias.dtype, device=bias.device)
        basis[torch.arange(len(index), device=bias.device), index] = _BASIS
        sizes = (basis if norm is None else norm(basis)).gather(1, index[:, None])
        answers = (part(basis) - bias) / sizes
        # What the norm's weight makes zero never reaches the product.
        rows.append(torch.where(sizes == 0, 0.0, answers))
    return torch.cat(rows)


def _gap(inputs: Tensor, matrix: Tensor, bias: Tensor, output: Tensor) -> float:
    """How far the product is from the module's output, relative to the largest output."""
    wide = torch.float64 if output.dtype == torch.float64 else torch.float32
    scale = float(output.abs().max())
    expected = inputs.to(output.device, wide) @ matrix.to(output.device, wide) + bias.to(wide)
    gap = float((expected - output.to(wide)).abs().max())
    return gap / scale if scale > 0 else gap
