"""Corrections to TransformerLens' block component.

Three things differ from TransformerLens 4.3: a block below `start_at_layer` does not run; a block without hooks runs
the model's own modules as if they had never been wrapped; an edit of `hook_resid_mid` reaches the skip path as well as
the MLP.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components import (
    GatedMLPBridge,
    LinearBridge,
    MLPBridge,
    MoEBridge,
    MoERouterBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.generalized_components.block import BlockBridge

from phaselens.lens.attention_owner import is_hooked
from phaselens.lens.components import StreamingAttention, attention_of
from phaselens.lens.original_components import NativeGateUp, NativeNorm

_DELEGATING = (LinearBridge, MLPBridge, GatedMLPBridge, MoEBridge, MoERouterBridge)
"""Components of TransformerLens that only call the module they wrap."""

_ORIGINAL = "_original_component"
"""The name under which a bridge component of TransformerLens holds the module that it wraps."""


class BridgeChild(NamedTuple):
    """A bridge component among the children of one of the model's modules, and its name there."""

    children: dict[str, nn.Module | None]
    name: str
    bridge: GeneralizedComponent


@dataclass(frozen=True)
class BlockContents:
    """The hook points and components inside a block, without the block and its own two points.

    ``bridges`` are the bridge components inside the model's own modules, each with the children of the innermost bridge
    there, one of which is the model's own module.
    """

    points: list[HookPoint]
    components: list[GeneralizedComponent]
    bridges: list[tuple[BridgeChild, dict[str, nn.Module | None]]]

    @cached_property
    def delegates(self) -> bool:
        """Whether all components let the model's own modules compute, so that rounding is the same."""
        return all(
            isinstance(component, StreamingAttention | NativeNorm | NativeGateUp)
            or type(component) in _DELEGATING
            for component in self.components
        )


class SkippingBlock(BlockBridge):
    """Mixin for a block bridge that skips blocks below `start_at_layer`, runs the model's own modules where nothing is
    hooked, and carries edits of the mid residual to the skip path."""

    #: The mid residual of the running forward, before and after its hooks, and the MLP's output.
    _mid_edit: dict[str, Tensor] | None = None

    def forward(self, *args: object, **kwargs: object) -> Any:
        """Run the block, unless the forward starts above it."""
        start = getattr(self, "_start_at_layer_idx", None)
        if start is not None and self._extract_layer_idx() < start:
            residual: Any = args[0] if args else kwargs["hidden_states"]
            given = getattr(self, "_start_residual", None)
            return self._skipped(residual if given is None else given)
        attention = attention_of(self)
        nulled = attention is not None and attention.nulled
        if self._is_unhooked() and (not nulled or kwargs.get("position_embeddings") is not None):
            if attention is not None and nulled:
                embeddings: Any = kwargs["position_embeddings"]
                kwargs["position_embeddings"] = attention.without_rotation(embeddings)
            with installing(self._contents.bridges, original=True):
                return super().forward(*args, **kwargs)
        # The original modules may still be installed: a hook of an outer forward can run a forward inside it.
        with installing(self._contents.bridges, original=False):
            return self._run_hooked(*args, **kwargs)

    def _skipped(self, residual: Any) -> Any:
        """Return what the layer would return if it left the residual unchanged."""
        return residual

    def _run_hooked(self, *args: object, **kwargs: object) -> Any:
        """Run the block with all of its hook points."""
        mid = self.find_point("hook_resid_mid")
        mlp_out = self.find_point("hook_mlp_out")
        if mid is None or not is_hooked(mid) or not self.adds_mid_again():
            return super().forward(*args, **kwargs)
        tensors: dict[str, Tensor] = {}

        def record(**captured: Tensor) -> None:
            if self._mid_edit is tensors:  # false in a forward that a hook runs inside this one
                tensors.update(captured)

        # These hooks are registered last, so they see the values that all other hooks leave. The second one is added
        # by TransformerLens' own method, since some blocks (Granite's) look for its hooks before they fire the point.
        handle = mid.register_forward_hook(lambda _point, inputs, mid: record(before=inputs[0], mid=mid))
        listener = None if mlp_out is None else mlp_out.add_hook(lambda output, hook: record(mlp_out=output))
        outer, self._mid_edit = self._mid_edit, tensors
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._mid_edit = outer
            handle.remove()
            if mlp_out is not None and listener is not None:
                listener.hook.remove()
                mlp_out.fwd_hooks = [hook for hook in mlp_out.fwd_hooks if hook is not listener]

    def returns_attn_out(self) -> bool:
        """Return whether the attention's module returns what `hook_attn_out` shows, or what it is computed from.

        A module that adds the residual itself (Bloom's) shows it inside, where nothing fires if its output is reused.
        """
        return True

    def adds_mid_again(self) -> bool:
        """Return whether the layer adds the mid residual to the MLP's output, beside passing it through the MLP."""
        return True

    def adds_mlp_out_exactly(self) -> bool:
        """Return whether what leaves the layer is the mid residual plus what `hook_mlp_out` shows, to the bit."""
        return True

    def _after_mid_edit(self, output: Tensor, edit: dict[str, Tensor]) -> Tensor:
        """Return the residual that leaves the layer after an edit of the mid residual.

        The model added the MLP's output to the residual that it kept from before the edit.
        """
        return edit["mid"] + edit["mlp_out"]

    def _is_unhooked(self) -> bool:
        """Return whether the block has no hooks inside and needs only the model's own computation.

        The block's own hook_in and hook_out do not count: they fire in any case.
        """
        contents = self._contents
        if (
            not contents.delegates
            or any(is_hooked(point) for point in contents.points)
            or ((attention := attention_of(self)) is not None and attention.needs_bridge())
        ):
            return False
        captures = {handle.id for handle in self._capture_hook_handles}
        return not any(
            component._backward_hooks
            or (component._forward_hooks.keys() | component._forward_pre_hooks.keys()) - captures
            for component in contents.components
        )

    @cached_property
    def _contents(self) -> BlockContents:
        excluded_modules = (self, self.hook_in, self.hook_out)
        modules = [
            module
            for module in self.modules()
            if not any(module is excluded for excluded in excluded_modules)
        ]
        return BlockContents(
            [module for module in modules if isinstance(module, HookPoint)],
            [module for module in modules if isinstance(module, GeneralizedComponent)],
            [(child, _innermost(child.bridge)._modules) for child in bridges_in(self.original_component)],
        )

    def find_point(self, alias: str) -> HookPoint | None:
        """Return the hook point behind one of the block's aliases, or None where the family has none."""
        target = getattr(self, alias, None)
        return target if isinstance(target, HookPoint) else None

    def _apply_output_hook(
        self, output: Tensor | tuple[Any, ...], *args: object, **kwargs: object
    ) -> Tensor | tuple[Any, ...]:
        if isinstance(output, list):  # as GPT's blocks return; TransformerLens knows tuples
            output = tuple(output)
        edit = self._mid_edit
        if edit and edit["mid"] is not edit["before"]:
            leaving = output[0] if isinstance(output, tuple) else output
            residual = self._after_mid_edit(leaving, edit)
            output = (residual, *output[1:]) if isinstance(output, tuple) else residual
        return super()._apply_output_hook(output, *args, **kwargs)


_RANGE_ATTRIBUTES = ("_start_at_layer_idx", "_start_residual", "_stop_at_layer_idx")


def layer_range(blocks: Sequence[Any] | nn.ModuleList) -> tuple[Any, ...]:
    """Return the values in which TransformerLens stores, in every block, the layers that a forward runs."""
    return tuple(getattr(blocks[0], name, None) for name in _RANGE_ATTRIBUTES)


def set_layer_range(blocks: Sequence[Any] | nn.ModuleList, new_range: tuple[Any, ...]) -> None:
    """Store these values in every block."""
    if all(value is current for value, current in zip(new_range, layer_range(blocks), strict=True)):
        return
    for block in blocks:
        for name, value in zip(_RANGE_ATTRIBUTES, new_range, strict=True):
            setattr(block, name, value)


def reset_layer_ranges(blocks: Sequence[Any] | nn.ModuleList) -> None:
    """Let every block run in every forward, also where only some blocks have a range."""
    for block in blocks:
        for name in _RANGE_ATTRIBUTES:
            setattr(block, name, None)


def install_bridges(block: SkippingBlock) -> None:
    """Install the bridge components of a block again, and forget what a forward kept in it."""
    block._mid_edit = None
    for (children, name, bridge), wrapped in block._contents.bridges:
        if children.get(name) is wrapped.get(_ORIGINAL):
            children[name] = bridge


def bridges_in(module: nn.Module) -> Iterator[BridgeChild]:
    """Yield the bridge components in a module of the model, at any depth."""
    for name, child in module._modules.items():
        if isinstance(child, GeneralizedComponent):
            yield BridgeChild(module._modules, name, child)
        if child is not None:
            yield from bridges_in(original_module(child))


def original_module(module: nn.Module) -> nn.Module:
    """Return the model's module behind a bridge component, or `module` itself if it is not one."""
    if not isinstance(module, GeneralizedComponent):
        return module
    original: nn.Module = _innermost(module)._modules.get(_ORIGINAL, module)
    return original


def _innermost(bridge: GeneralizedComponent) -> GeneralizedComponent:
    """Return the innermost of nested bridge components, which wraps the model's module."""
    while isinstance(bridge.original_component, GeneralizedComponent):
        bridge = bridge.original_component
    return bridge


@contextmanager
def installing(
    bridges: Sequence[tuple[BridgeChild, dict[str, nn.Module | None]]], *, original: bool
) -> Iterator[None]:
    """Install the model's original modules, or the bridge components that wrap them, inside the context.

    A bridge costs about 15 µs per component even without hooks, which is a sixth of a forward of two tokens.
    """
    replaced = []
    try:
        for (children, name, bridge), wrapped in bridges:
            # Looked up each time, since another library may replace the module: quantisation does.
            module = wrapped.get(_ORIGINAL, bridge)
            current = children.get(name)
            if current is (bridge if original else module):
                replaced.append((children, name, current))
                children[name] = module if original else bridge
        yield
    finally:
        for children, name, current in replaced:
            children[name] = current
