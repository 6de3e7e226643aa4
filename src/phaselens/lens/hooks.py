"""Hooks on a loaded model: its hook points as `phaselens hooks` prints them, and pairs of a name and a function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from phaselens.errors import InputError, is_list_like, require_text, short_form
from phaselens.lens.key_edits import KeyHook
from phaselens.lens.points import (
    Hook,
    HookFunction,
    declaration,
    dimensions,
    in_layer,
    is_in_head_norm,
    layer_and_point,
)

if TYPE_CHECKING:
    from transformer_lens.hook_points import HookPoint

    from phaselens.lens.bridge import HookedTransformer


@dataclass(frozen=True)
class HookPointInfo:
    """One hook point of a model, or a point that several layers share: `blocks.{0..7}.attn.hook_sink`."""

    name: str
    shape: str
    dtype: str
    meaning: str


def describe_hooks(lens: HookedTransformer, *, every: bool = False) -> list[HookPointInfo]:
    """Return the hook points of a model in the order they fire; a point that several layers share is one row.

    Args:
        every: include the inner points of TransformerLens' components (`hook_in`, `hook_out`, …), with measured shapes.

    Returns:
        Only points that fire in a plain forward of this model; found by running one.
    """
    names = [name for name in lens.hook_dict if every or declaration(name) is not None]
    layers_by_row: dict[tuple[str, str, str, str], list[int | None]] = {}
    for name, activation in _fire(lens, names).items():
        declared = declaration(name)
        shape = str(list(activation.shape)) if declared is None else declared.shape
        meaning = "" if declared is None else declared.meaning
        layer, point = layer_and_point(name)
        dtype = str(activation.dtype).removeprefix("torch.")
        pattern = point if layer is None else in_layer("{layer}", point)
        layers_by_row.setdefault((pattern, shape, dtype, meaning), []).append(layer)
    return [
        HookPointInfo(pattern.replace("{layer}", _ranges(layers)), shape, dtype, meaning)
        for (pattern, shape, dtype, meaning), layers in layers_by_row.items()
    ]


def describe_absent(lens: HookedTransformer) -> list[tuple[str, str]]:
    """Return the hook points that the model lacks, in some layers or all, each with the reason.

    In a layer without attention, all points of attention are one entry: `blocks.0.attn.*`.
    """
    info = lens.info
    layers_by_entry: dict[tuple[str, str], list[int | None]] = {}
    for layer in range(info.n_layers):
        if layer not in info.attention_layers:
            entry = (in_layer("{layer}", "attn.*"), f"the layer is {info.kind_of(layer)}")
            layers_by_entry.setdefault(entry, []).append(layer)
    for name, reason in info.absent.items():
        absent_in, point = layer_and_point(name)
        layers_by_entry.setdefault((in_layer("{layer}", point), reason), []).append(absent_in)
    return [
        (pattern.replace("{layer}", _ranges(layers)), reason)
        for (pattern, reason), layers in layers_by_entry.items()
    ]


def position_axis(lens: HookedTransformer, name: str) -> int | None:
    """Return the dimension of the tensor at a hook point that runs over positions (of queries, for a matrix), or None.

    The registry declares it for its points. Inside the norms of queries and keys it is measured, since families norm
    before or after they move the heads in front of the positions. All other points are [batch, pos, …].
    """
    require_text("the name of a hook point", name)
    declared = dimensions(name)
    if declared:
        return next((axis for axis, dimension in enumerate(declared) if dimension in ("pos", "query")), None)
    if not is_in_head_norm(name):
        return 1
    if name not in lens.position_axes:
        shapes = []
        for n_tokens in (5, 6):
            activations = _fire(lens, [name], n_tokens)
            shapes.append(tuple(activations[name].shape) if name in activations else ())
        axes = [axis for axis, sizes in enumerate(zip(*shapes, strict=False)) if sizes == (5, 6)]
        lens.position_axes[name] = axes[0] if axes and axes[0] > 0 else None
    return lens.position_axes[name]


def _fire(lens: HookedTransformer, names: Sequence[str], n_tokens: int = 5) -> dict[str, Tensor]:
    """Return the activations of the points that fire in one forward of a few tokens, in the order they fire."""
    activations: dict[str, Tensor] = {}

    def keep(name: str) -> HookFunction:
        def note(value: Tensor, hook: object) -> None:
            if isinstance(value, Tensor):  # some components of TransformerLens return tuples
                activations[name] = value

        return note

    tokens = torch.zeros((1, min(n_tokens, lens.info.n_ctx or n_tokens)), dtype=torch.long)
    hooks = [(name, keep(name)) for name in names if lens.find_hook(name) is not None]
    lens.stream(tokens, hooks, unembed=True)
    return activations


def _ranges(layers: Sequence[int | None]) -> str:
    """Abbreviate layer numbers: `3`, `{0..7}`, `{0,2,4}`."""
    numbers = sorted(layer for layer in layers if layer is not None)
    if len(numbers) <= 1:
        return "".join(map(str, numbers))
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{{{numbers[0]}..{numbers[-1]}}}"
    return "{" + ",".join(map(str, numbers)) + "}"


def resolve_hooks(lens: HookedTransformer, hooks: Iterable[Hook]) -> list[tuple[HookPoint, HookFunction]]:
    """Resolve the names in pairs of a name and a function to hook points.

    Raises:
        InputError: for anything else, and for a hook point that the model does not have.
    """
    if not is_list_like(hooks):
        raise InputError(f"expected hooks as a list of pairs (name, function), received {short_form(hooks)}")
    resolved = []
    for pair in hooks:
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not isinstance(pair[0], str):
            raise InputError(
                f"expected each of hooks as a pair (name, function), received {short_form(pair)}"
            )
        name, function = pair
        point = lens.require_hook(name)
        if not callable(function):
            raise InputError(
                f"expected a function for the hook point {name}, received {short_form(function)}"
            )
        is_checked = isinstance(function, KeyHook)  # which checks what it returns
        resolved.append((point, function if is_checked else _CheckedHook(name, function)))
    return resolved


class _CheckedHook:
    """A hook function whose result must be None or a tensor of the shape that it received."""

    def __init__(self, name: str, function: HookFunction) -> None:
        self._name = name
        self._function: Callable[..., object] = function

    def __call__(self, tensor: Tensor, hook: object) -> Tensor | None:
        returned: object = self._function(tensor, hook=hook)
        if returned is None or not isinstance(tensor, Tensor):
            return returned
        if not isinstance(returned, Tensor) or returned.shape != tensor.shape:
            shape = list(returned.shape) if isinstance(returned, Tensor) else short_form(returned)
            raise InputError(
                f"the hook of {self._name} returned {shape}; return None, or a tensor of shape {list(tensor.shape)}"
            )
        return returned
