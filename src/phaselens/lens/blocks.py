"""TransformerLens' block component, mended.

Three things differ from TransformerLens 4.3: a block below `start_at_layer` does not run; where nobody listens inside
a block, the model's own modules run as if they had never been wrapped; an edit of `hook_resid_mid` reaches the skip
path as well as the MLP.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components import (
    GatedMLPBridge,
    LinearBridge,
    MLPBridge,
    MoEBridge,
    MoERouterBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from phaselens.lens.components import StreamingAttention
from phaselens.lens.interface import is_hooked
from phaselens.lens.native import NativeGateUp, NativeNorm

_DELEGATING = (LinearBridge, MLPBridge, GatedMLPBridge, MoEBridge, MoERouterBridge)
"""Components of TransformerLens that call the module they wrap, and compute nothing of their own."""


Place = tuple[dict[str, Any], str, GeneralizedComponent]
"""The children of a module, the name of one of them, and the bridge component that stands there."""

_OWN = "_original_component"
"""Under which name a bridge component of TransformerLens has the module that it wraps among its children."""


@dataclass(frozen=True)
class Inside:
    """A block's hook points and components, without itself and its own two points; and where bridge components stand
    in the model's own modules, each with the children of the innermost bridge there, one of which is the model's own
    module."""

    points: list[HookPoint]
    parts: list[GeneralizedComponent]
    places: list[tuple[Place, dict[str, Any]]]

    @cached_property
    def delegates(self) -> bool:
        """Whether all components let the model's own modules compute, so that these round as they do."""
        return all(
            isinstance(part, StreamingAttention | NativeNorm | NativeGateUp) or type(part) in _DELEGATING
            for part in self.parts
        )


class SkippingBlock:
    """Mixed into a block bridge: skips below `start_at_layer`, runs the model's own modules where nobody listens, and
    carries mid-residual edits to the skip path."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the block, unless the pass starts above it."""
        start = getattr(self, "_start_at_layer_idx", None)
        if start is not None and self._extract_layer_idx() < start:
            return args[0] if args else kwargs["hidden_states"]
        if self._is_unheard() and (not self.attn.nulled or kwargs.get("position_embeddings") is not None):
            if self.attn.nulled:
                kwargs["position_embeddings"] = self.attn.without_rotation(kwargs["position_embeddings"])
            with standing(self._inside.places, plain=True):
                return super().forward(*args, **kwargs)  # type: ignore[misc]
        # Also where a hook of an unheard forward through this block runs a forward of its own.
        with standing(self._inside.places, plain=False):
            return self._heard(*args, **kwargs)

    def _heard(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the block with all of its hook points."""
        mid = self._point("hook_resid_mid")
        if mid is None or not is_hooked(mid):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        branch = self._point("hook_mlp_out")
        seen: dict[str, Tensor] = {}

        def note(**tensors: Tensor) -> None:
            if self._mid_edit is seen:  # and not that of a forward within a hook
                seen.update(tensors)

        # Registered last, these see what all other hooks made of the value. The second is added as TransformerLens
        # does it, since some blocks (Granite's) ask it whether anybody listens before they fire the point.
        handle = mid.register_forward_hook(lambda _m, given, out: note(before=given[0], mid=out))
        listener = branch.add_hook(lambda out, hook: note(branch=out))
        outer, self._mid_edit = getattr(self, "_mid_edit", None), seen
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._mid_edit = outer
            handle.remove()
            listener.hook.remove()
            branch.fwd_hooks = [other for other in branch.fwd_hooks if other is not listener]

    def _is_unheard(self: Any) -> bool:
        """Whether nothing listens inside the block, or asks for anything but the model's own computation. (Its own
        hook_in and hook_out are outside: they fire in any case.)"""
        inside = self._inside
        if (
            not inside.delegates
            or any(is_hooked(point) for point in inside.points)
            or self.attn.needs_itself()
        ):
            return False
        ours = {handle.id for handle in self._capture_hook_handles}
        return not any(
            part._backward_hooks or (part._forward_hooks.keys() | part._forward_pre_hooks.keys()) - ours
            for part in inside.parts
        )

    @cached_property
    def _inside(self: Any) -> Inside:
        own = (self, self.hook_in, self.hook_out)
        modules = [module for module in self.modules() if not any(module is each for each in own)]
        return Inside(
            [module for module in modules if isinstance(module, HookPoint)],
            [module for module in modules if isinstance(module, GeneralizedComponent)],
            [(place, _innermost(place[2])._modules) for place in bridges_in(self.original_component)],
        )

    def _point(self: Any, alias: str) -> Any:
        """The hook point behind one of the block's aliases, or None where the family has none."""
        target = getattr(self, alias, None)
        return target if isinstance(target, HookPoint) else None

    def _apply_output_hook(self: Any, output: Any, *args: Any, **kwargs: Any) -> Any:
        seen = getattr(self, "_mid_edit", None)
        if seen and seen["mid"] is not seen["before"]:
            # The model adds the MLP's output to the residual it kept from before the edit; add it to the edited one.
            whole = seen["mid"] + seen["branch"]
            output = (whole, *output[1:]) if isinstance(output, tuple) else whole
        return super()._apply_output_hook(output, *args, **kwargs)  # type: ignore[misc]


def bridges_in(module: Any) -> Iterator[Place]:
    """The bridge components in a module of the model, at any depth."""
    for name, child in module._modules.items():
        if isinstance(child, GeneralizedComponent):
            yield module._modules, name, child
        if child is not None:
            yield from bridges_in(own_module(child))


def own_module(child: Any) -> Any:
    """The model's module behind a bridge component; itself, where there is none."""
    return _innermost(child)._modules.get(_OWN, child) if isinstance(child, GeneralizedComponent) else child


def _innermost(bridge: GeneralizedComponent) -> GeneralizedComponent:
    """Of bridge components around one another, the one that wraps the model's module."""
    while isinstance(bridge.original_component, GeneralizedComponent):
        bridge = bridge.original_component
    return bridge


@contextmanager
def standing(places: Sequence[tuple[Place, dict[str, Any]]], *, plain: bool) -> Iterator[None]:
    """Inside, the model's own modules stand at `places`, as before it was wrapped (`plain`), or the bridge components.

    Even where nobody listens, a bridge costs some 15 µs a component; on two tokens, that is a sixth of a forward.
    """
    replaced = []
    try:
        for (children, name, bridge), wrapped in places:
            # Looked up each time, since another library may replace it: quantisation does.
            own = wrapped.get(_OWN, bridge)
            current = children.get(name)
            if current is (bridge if plain else own):
                replaced.append((children, name, current))
                children[name] = own if plain else bridge
        yield
    finally:
        for children, name, module in replaced:
            children[name] = module
