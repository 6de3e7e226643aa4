"""Where each entry of the queries, keys and values comes from, measured with numbered values.

The outputs of the linear modules inside an attention module are replaced by codes that number their entries. The codes
that reach the attention interface tell which module computes the queries, and which of its outputs is which entry of
which head, whatever the layout: one projection each, one for all three, a gate beside the queries, keys from two parts.
The forward has one token, at position 0, where a rotation is the identity, and skips the norms of queries and keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from phaselens.lens import families
from phaselens.lens.interface_calls import InterfaceCall
from phaselens.lens.layer_stack import LayerStack, layer_modules, probe_ids
from phaselens.lens.module_calls import pass_on, recording_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BASE = 16
"""Codes are 1 + digit / 16, which are exact in every dtype."""
_N_DIGITS = 6


@dataclass(frozen=True, eq=False)
class ProjectionMap:
    """The entries of a module's output that are queries (or keys, or values): ``index`` [head, d_head].

    ``name`` is the module's name in its layer. ``is_whole`` is True where they are the whole output in its order.
    """

    name: str
    index: Tensor
    is_whole: bool

    def split(self, output: Tensor, n_texts: int) -> Tensor:
        """Return the entries [batch, pos, head, d_head] of the module's output [batch, …, pos, all]."""
        rows = output.reshape(n_texts, -1, output.shape[-1])
        return rows[..., self.index.to(output.device)]

    def put(self, output: Tensor, entries: Tensor) -> Tensor:
        """Return a copy of the module's output with other entries."""
        edited = output.clone()
        rows = entries.flatten(-2).to(output).reshape(*output.shape[:-1], -1)
        edited[..., self.index.to(output.device).flatten()] = rows
        return edited


@dataclass(frozen=True, eq=False)
class AttentionParts:
    """The maps of a layer's queries, keys and values; a reason, in words, in place of one that does not exist.

    ``output`` is the name in its layer of the projection of the heads' outputs; None without one.
    """

    query: ProjectionMap | str
    key: ProjectionMap | str
    value: ProjectionMap | str
    output: str | None = None


def measure_projections(
    model: PreTrainedModel, stack: LayerStack, attention_names: Mapping[int, str]
) -> dict[int, AttentionParts]:
    """Return the maps of each layer with attention.

    Args:
        attention_names: the name in its layer of each layer's attention module.
    """
    modules: dict[str, nn.Module] = {}
    candidates: dict[int, list[str]] = {}
    for layer, attention in attention_names.items():
        inside = layer_modules(stack.layers[layer].module)
        for name, module in inside.items():
            if name.startswith(f"{attention}.") and is_linear(module):
                modules[f"{layer}:{name}"] = module
                candidates.setdefault(layer, []).append(name)
    n_rows = 3 + _N_DIGITS

    def code(name: str, output: Tensor) -> Tensor | None:
        if len(output) != n_rows:
            return None
        layer, _, module = name.partition(":")
        number = candidates[int(layer)].index(module)
        width = output.shape[-1]
        entries = torch.arange(width)
        rows = [torch.zeros(width)]
        rows += [torch.full((width,), float(digit)) for digit in _digits(number, 2)]
        rows += [(entries // _BASE**place % _BASE).float() for place in range(_N_DIGITS)]
        codes = 1.0 + torch.stack(rows) / _BASE
        return codes.view(n_rows, *[1] * (output.dim() - 2), width).expand_as(output).to(output)

    norms = [
        norm
        for layer, attention in attention_names.items()
        for norm in families.norms_in(stack.layers[layer].module.get_submodule(attention))
    ]
    handles = [norm.register_forward_hook(pass_on) for norm in norms]
    calls: list[InterfaceCall] = []
    try:
        with recording_modules(modules, on_output=code, interface_calls=calls):
            model(input_ids=probe_ids(model, 1).expand(n_rows, -1), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    by_module = {id(call.module): call for call in calls}
    parts = {}
    for layer, attention in attention_names.items():
        call = by_module[id(stack.layers[layer].module.get_submodule(attention))]
        names = candidates.get(layer, [])
        widths = {name: _width(modules[f"{layer}:{name}"]) for name in names}
        parts[layer] = AttentionParts(
            _map_of(call.query, "queries", names, widths),
            _map_of(call.key, "keys", names, widths),
            _map_of(call.value, "values", names, widths),
        )
    return parts


def is_linear(module: nn.Module) -> bool:
    """Return whether a module holds a matrix of its own: a linear module, however its weight is stored."""
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    has_inner = any(is_linear(child) for child in module.children())
    return any(tensor.dim() >= 2 for tensor in own) and not has_inner


def _width(module: nn.Module) -> int | None:
    width = getattr(module, "out_features", None) or getattr(module, "nf", None)
    return int(width) if width is not None else None


def _digits(number: int, n_digits: int) -> list[int]:
    return [number // _BASE**place % _BASE for place in range(n_digits)]


def _map_of(
    received: Tensor, label: str, names: Sequence[str], widths: Mapping[str, int | None]
) -> ProjectionMap | str:
    """Read the codes in what the interface received, [row, head, 1, d]."""
    values = received[:, :, -1].double().cpu()
    factor = values[0]
    digits = (values[1:] / factor - 1.0) * _BASE
    rounded = digits.round()
    if not bool(digits.isfinite().all()) or float((digits - rounded).abs().max()) > 0.2:
        return f"{label} are not the outputs of linear modules, scaled, normed and rotated"
    rounded = rounded.long()
    if bool((rounded < 0).any() | (rounded >= _BASE).any()):
        return f"{label} are not the outputs of linear modules, scaled, normed and rotated"
    numbers = (rounded[0] + _BASE * rounded[1]).unique().tolist()
    if not set(numbers) <= set(range(len(names))):
        return f"{label} come from another layer"
    if len(numbers) > 1:
        sources = " and ".join(names[number].rsplit(".", 1)[-1] for number in numbers)
        return f"{label} are put together from the outputs of {sources}"
    index = sum(rounded[2 + place] * _BASE**place for place in range(_N_DIGITS))
    assert isinstance(index, Tensor)
    by_head = index.sort(-1).values.unique(dim=0)
    if by_head.unique().numel() != by_head.numel():
        return f"heads share parts of their {label}"
    name = names[numbers[0]]
    is_whole = (
        torch.equal(by_head.flatten(), torch.arange(by_head.numel())) and widths[name] == by_head.numel()
    )
    return ProjectionMap(name, by_head, is_whole)
