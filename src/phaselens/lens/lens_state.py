"""What calls and contexts change on a lens for a while: hooks, layer ranges, options, replays, rotation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformer_lens.hook_points import HookPoint

from phaselens.lens.blocks import SkippingBlock, install_bridges, reset_layer_ranges
from phaselens.lens.components import attention_layers

if TYPE_CHECKING:
    from phaselens.lens.bridge import HookedTransformer

_HOOK_STORES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""The attributes of a module in which PyTorch keeps its hooks."""
_OWN_STATE = ("info", "context_level")
_ATTENTION_STATE = ("nulled", "replay", "kernels")


class HookStores:
    """Where hooks on a lens are kept: PyTorch's dictionaries of each module, and TransformerLens' hook points.

    The lens itself is left out: its attributes refer to this object, and a cycle would keep the weights alive.
    """

    def __init__(self, lens: HookedTransformer) -> None:
        modules = [module for module in lens.modules() if module is not lens]
        self._attributes = [(vars(module), name) for module in modules for name in _HOOK_STORES]
        self._dicts = [attributes[name] for attributes, name in self._attributes]
        self._points = [module for module in modules if isinstance(module, HookPoint)]

    def copy(self) -> tuple[dict[int, dict[int, Any]], dict[int, tuple[list[Any], list[Any]]]]:
        """Return the hooks of the dictionaries that hold any, and the handles of the points that have any."""
        hooks = {index: dict(stored) for index, stored in enumerate(self._dicts) if stored}
        if not hooks:
            return hooks, {}
        handles = {
            index: (list(point.fwd_hooks), list(point.bwd_hooks))
            for index, point in enumerate(self._points)
            if point.fwd_hooks or point.bwd_hooks
        }
        return hooks, handles

    def restore(
        self, hooks: dict[int, dict[int, Any]], handles: dict[int, tuple[list[Any], list[Any]]]
    ) -> None:
        """Put back what `copy` returned."""
        for index, stored in enumerate(self._dicts):
            attributes, name = self._attributes[index]
            attributes[name] = stored  # `loss_point` replaces some for a while
            before = hooks.get(index, {})
            if list(stored) != list(before):
                stored.clear()
                stored.update(before)
        for index, point in enumerate(self._points):
            forward, backward = handles.get(index, ([], []))
            point.fwd_hooks, point.bwd_hooks = list(forward), list(backward)


class LensState:
    """A copy of the state that calls and contexts change, and that `restore` puts back.

    Between calls, every block runs all layers, has its bridge components installed, and holds nothing of a forward.
    """

    def __init__(self, lens: HookedTransformer, stores: HookStores) -> None:
        self._hooks, self._handles = stores.copy()
        self._own = {name: vars(lens)[name] for name in _OWN_STATE if name in vars(lens)}
        self._attention = {
            layer: {name: getattr(attention, name) for name in _ATTENTION_STATE}
            for layer, attention in attention_layers(lens).items()
        }
        options = vars(lens._streaming_options)
        self._options = {name: value for name, value in options.items() if name != "rows"}
        rows = lens.rows
        self._rows = {"lengths": rows.lengths, "segments": rows.segments, "n_segments": rows.n_segments}
        self._calls = list(rows._calls)

    def restore(self, lens: HookedTransformer, stores: HookStores) -> None:
        """Put the state back; it may be interrupted and called again."""
        stores.restore(self._hooks, self._handles)
        for name, value in self._own.items():
            setattr(lens, name, value)
        if "context_level" not in self._own:
            lens.__dict__.pop("context_level", None)
        reset_layer_ranges(lens.blocks)
        for block in lens.blocks:
            if isinstance(block, SkippingBlock):
                install_bridges(block)
        for layer, attention in attention_layers(lens).items():
            for name, value in self._attention[layer].items():
                setattr(attention, name, value)
            attention.forget_call()
        vars(lens._streaming_options).update(self._options)
        vars(lens.rows).update(self._rows)
        lens.rows._calls[:] = self._calls
