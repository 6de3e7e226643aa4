"""Weights of projections, verified against the model's own modules, and the step before the output projection.

A module does not always multiply by its stored weight, which may be packed, scaled, adapted (LoRA), or on another
device. So a weight is read as stored from a plain linear module only; of any other module, it is the output for the
basis vectors. Either is then compared with the module on random inputs. A module that rounds its input before it
multiplies (8-bit activations) is linear in the rounded input only, which `Projection.multiplied` returns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from transformers.pytorch_utils import Conv1D

from phaselens.errors import InputError, RefusedModel, require_text, short_form
from phaselens.lens import families
from phaselens.lens.blocks import original_module
from phaselens.lens.components import StreamingAttention, attention_of
from phaselens.lens.placement import loaded_weights
from phaselens.lens.precision import LIMITS
from phaselens.lens.projection import ROUNDINGS, Projection

if TYPE_CHECKING:
    from phaselens.lens.bridge import HookedTransformer

_ATTENTION = {"W_Q": "q", "W_K": "k", "W_V": "v", "W_O": "o"}
_MLP = {"W_in": "in", "W_gate": "gate", "W_out": "out"}
_BASIS = 1024.0
"""Length of the basis vectors: a power of two, large compared with the epsilon of a norm inside the module."""
_CHUNK = 1024
"""Number of basis vectors per call of a module."""
_PROBES = 64
"""Number of random inputs: so many tell apart ways of rounding that differ in few entries."""


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


_ROUNDED: dict[str, Callable[[Tensor], Tensor]] = {"": _unchanged} | ROUNDINGS
"""The ways in which a module may treat its input before the product, by name."""


@dataclass(frozen=True)
class _WeightSource:
    """The module of a projection.

    ``select`` takes the projection's output from the module's output, ``reshape`` gives the weight its shape.
    """

    module: nn.Module
    select: Callable[[Tensor], Tensor]
    reshape: Callable[[Tensor], Tensor]

    def __call__(self, inputs: Tensor) -> Tensor:
        # A module that fuses several projections is called without its hooks, which fire the points of each part.
        call = self.module if self.select is _unchanged else self.module.forward
        # As in a forward, [batch, pos, in]: some modules round by other scales where a dimension is missing.
        output: Tensor = self.select(call(inputs[None]))[0]
        return output


def projection(lens: HookedTransformer, layer: int | None, name: str) -> Projection:
    """Return the projection that TransformerLens calls `blocks.{layer}.{name}`: `attn.W_O`, `mlp.W_in`.

    Raises:
        InputError: where the layer has no such projection, or no weight reproduces its module; with the reason.

    >>> import phaselens
    >>> from phaselens.testing import tiny_model
    >>> lens = phaselens.load(tiny_model("llama"))
    >>> tuple(projection(lens, 0, "attn.W_O").weight.shape)
    (4, 8, 32)
    """
    source = _weight_source(lens, layer, name)
    if source is None:
        raise InputError(
            f"{lens.info.label} has no projection {name!r} in layer {layer}; it may have attn.W_Q, W_K, W_V, W_O and "
            "mlp.W_in, W_gate, W_out"
        )
    module = source.module
    label = f"{lens.info.label}: {name} of layer {layer} ({type(module).__name__})"
    embedding = families.embedding_of(lens.original_model)
    stored = stored_matrix(module)
    norm = families.norm_inside(module) if stored is None else None
    with torch.no_grad():
        d_in = _d_in(lens, layer, name)
        probes = torch.randn((_PROBES, d_in), generator=torch.Generator().manual_seed(0))
        probes = probes.to(embedding.device, embedding.dtype)
        bias = source(torch.zeros_like(probes[:1]))[0]
        output = source(probes)
        normed = probes if norm is None else norm(probes)
        products, lengths = _products(source, stored, d_in, norm, bias)
        gaps = {
            rounding: _gap(_ROUNDED[rounding](normed), _divided(products, length), bias, output)
            for rounding, length in lengths.items()
        }
    rounding = min(gaps, key=lambda name: gaps[name])
    if not gaps[rounding] <= LIMITS[lens.arithmetic.dtype]:
        raise InputError(
            f"{label} does not multiply its input by a weight, exact or rounded in a known way; "
            f"the closest candidate differs by {gaps[rounding]:.2g} of the largest output; read its output instead"
        )
    return Projection(source.reshape(_divided(products, lengths[rounding])), bias, rounding, norm)


def dense_weight(module: nn.Module, d_in: int, like: Tensor) -> Tensor | None:
    """Return the weight [out, in] that a linear module multiplies by; None if it is not linear in its input.

    Args:
        module: a projection without a norm inside.
        d_in: the size of its input.
        like: a tensor of the model's dtype on the module's device.
    """
    stored = stored_matrix(module)
    if stored is not None:
        return stored.T
    source = _WeightSource(module, _unchanged, _unchanged)
    with torch.no_grad():
        probes = torch.randn((_PROBES, d_in), generator=torch.Generator().manual_seed(0)).to(like)
        bias = source(torch.zeros_like(probes[:1]))[0]
        products, lengths = _products(source, None, d_in, None, bias)
        matrix = _divided(products, lengths[""])
        is_linear = _gap(probes, matrix, bias, source(probes)) <= LIMITS[like.dtype]
    return matrix.T if is_linear else None


def _require_layer(lens: HookedTransformer, layer: int | None) -> None:
    """Raise InputError for a layer that the model does not have, such as −1, which Python would count from the end."""
    n_layers = len(lens.blocks)
    if layer is not None and (isinstance(layer, bool) or layer not in range(n_layers)):
        raise InputError(
            f"{lens.info.label} has layers 0 to {n_layers - 1}, and no layer {short_form(layer)}"
        )


def weight_of(lens: HookedTransformer, layer: int | None, name: str) -> Tensor:
    """Return the weight that TransformerLens calls `blocks.{layer}.{name}`; that of a projection reproduces its module.

    Raises:
        InputError: for a name that the model does not have, and for a weight that does not reproduce its module.
    """
    if _weight_source(lens, layer, name) is not None:
        served = projection(lens, layer, name)
        if served.is_linear:
            return served.weight
        step = f"rounds its input to {served.rounding}" if served.rounding else "norms its input"
        raise InputError(
            f"{lens.info.label}: the module of {name} in layer {layer} {step} before it multiplies, so that no weight "
            f"reproduces it; use projection({name!r}) of a layer's view or projection_of({layer}, {name!r}) of the "
            "model, which include that step"
        )
    target: object = lens if layer is None else lens.blocks[layer]
    model = lens.original_model
    roots = (families.unembedding_of(model),) if layer is None else (lens.blocks[layer],)
    with loaded_weights(*roots) as was_offloaded:
        try:
            for attribute in name.split("."):
                target = getattr(target, attribute)
        except AttributeError as error:
            raise InputError(f"{lens.info.label} has no weight {name!r} in layer {layer}") from error
        if was_offloaded and isinstance(target, Tensor):
            target = target.detach().clone()
    if not isinstance(target, Tensor):
        raise InputError(f"{lens.info.label}: {name!r} in layer {layer} is not a weight")
    if target.is_meta:
        raise InputError(
            f"{lens.info.label}: {name!r} in layer {layer} is offloaded by the device map, and TransformerLens keeps "
            "no copy; load the model without device_map to read it"
        )
    if not target.is_floating_point():
        raise InputError(
            f"{lens.info.label}: {name!r} in layer {layer} is stored as {target.dtype}, which is not what the model "
            "computes with"
        )
    return target.detach()


def _weight_source(lens: HookedTransformer, layer: int | None, name: str) -> _WeightSource | None:
    """Return the module of the projection of that name, or None where the layer has no such projection."""
    require_text("the name of a weight", name)
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
        return _attention_source(component, weight, original_module(bridge))
    fused = getattr(component, "fused_attr", None)
    if fused is None or weight == "W_out":
        return _WeightSource(original_module(bridge), _unchanged, _unchanged)
    if not component._is_gate_then_up():
        raise InputError(
            f"{name} of layer {layer}: the layout of the fused gate and up projections is unknown"
        )
    half = ("W_gate", "W_in").index(weight)
    fused_module = original_module(getattr(component.original_component, fused))
    return _WeightSource(fused_module, lambda fused_output: fused_output.chunk(2, dim=-1)[half], _unchanged)


def _attention_source(attention: StreamingAttention, weight: str, module: nn.Module) -> _WeightSource:
    n_heads = attention.facts.n_heads
    if weight == "W_O":
        return _WeightSource(module, _unchanged, lambda matrix: matrix.unflatten(0, (n_heads, -1)))
    n_out = n_heads if weight == "W_Q" else attention.facts.n_kv_heads

    def by_head(matrix: Tensor) -> Tensor:
        return matrix.unflatten(-1, (n_out, -1)).permute(1, 0, 2)

    if "qkv" not in attention.submodules:
        return _WeightSource(module, _unchanged, by_head)
    try:
        layout = families.fused_layout(attention.original_component)
    except RefusedModel as error:
        raise InputError(str(error)) from error
    index = ("W_Q", "W_K", "W_V").index(weight)
    return _WeightSource(
        original_module(attention.qkv), lambda fused: layout.split(fused)[index].flatten(-2), by_head
    )


def _d_in(lens: HookedTransformer, layer: int | None, name: str) -> int:
    """Return the size of a projection's input."""
    if name == "attn.W_O":
        attention = None if layer is None else attention_of(lens.blocks[layer])
        assert attention is not None
        return attention.facts.n_heads * attention.facts.d_value
    if name != "mlp.W_out":
        return int(lens.info.d_model)
    return families.d_mlp_of(lens.original_model, original_module(lens.blocks[layer].mlp.out))


def stored_matrix(module: nn.Module) -> Tensor | None:
    """Return the stored weight [in, out] if it alone determines the module's product, else None."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or type(weight) not in (Tensor, nn.Parameter):
        return None
    is_plain = (
        type(module) in (nn.Linear, Conv1D)
        and weight.is_floating_point()
        and not weight.is_meta
        and not is_parametrized(module)
        and "forward" not in vars(module)
        and not module._forward_hooks
        and not module._forward_pre_hooks
    )
    if not is_plain:
        return None
    return weight if isinstance(module, Conv1D) else weight.T


def _products(
    source: _WeightSource,
    stored: Tensor | None,
    d_in: int,
    norm: Callable[[Tensor], Tensor] | None,
    bias: Tensor,
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Return the matrix [in, out] that the module multiplies by, row by row times a length, and the lengths.

    The rows are the module's output for each basis vector, without its bias. Their lengths [in] are those of the basis
    vectors after the norm and each way of rounding. A stored matrix is that of no rounding, and has no lengths.
    """
    if stored is not None:
        return source.select(stored), {"": None}
    rows: list[Tensor] = []
    lengths: dict[str, list[Tensor]] = {rounding: [] for rounding in _ROUNDED}
    for start in range(0, d_in, _CHUNK):
        index = torch.arange(start, min(start + _CHUNK, d_in), device=bias.device)
        basis = torch.zeros((len(index), d_in), dtype=bias.dtype, device=bias.device)
        basis[torch.arange(len(index), device=bias.device), index] = _BASIS
        normed = basis if norm is None else norm(basis)
        rows.append(source(basis) - bias)
        for rounding, rounded in _ROUNDED.items():
            lengths[rounding].append(rounded(normed).gather(1, index[:, None])[:, 0])
    return torch.cat(rows), {rounding: torch.cat(parts) for rounding, parts in lengths.items()}


def _divided(products: Tensor, lengths: Tensor | None) -> Tensor:
    """Return the rows divided by their lengths; zero where a norm's weight sets the dimension to zero."""
    if lengths is None:
        return products
    return torch.where(lengths[:, None] == 0, 0.0, products / lengths[:, None])


def _gap(inputs: Tensor, matrix: Tensor, bias: Tensor, output: Tensor) -> float:
    """Return the largest difference between the product and the module's output, relative to the largest output."""
    wide = torch.float64 if output.dtype == torch.float64 else torch.float32
    scale = float(output.abs().max())
    expected = inputs.to(output.device, wide) @ matrix.to(output.device, wide) + bias.to(wide)
    gap = float((expected - output.to(wide)).abs().max())
    return gap / scale if scale > 0 else gap
