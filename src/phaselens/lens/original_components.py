"""Corrections to TransformerLens' norms and fused MLPs: the model's own module computes, once."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, cat, dtype, equal, nn
from torch.utils.hooks import RemovableHandle
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components import JointGateUpMLPBridge, NormalizationBridge

from phaselens.lens.attention_owner import is_hooked


def watch_parts(
    module: nn.Module,
    points: Sequence[HookPoint],
    split: Callable[[Tensor], Sequence[Tensor]],
    join: Callable[[list[Tensor]], Tensor],
) -> RemovableHandle:
    """Fire `points` on the projections that `module` fuses, until the returned handle is removed."""

    def fire(_module: object, _args: object, fused: Tensor) -> Tensor:
        projections = split(fused)
        edited = [point(projection) for point, projection in zip(points, projections, strict=True)]
        # The projections are views: writes in place are in `fused` already.
        is_replaced = any(map(operator.is_not, edited, projections))
        return join(edited) if is_replaced else fused

    return module.register_forward_hook(fire)


class NativeNorm(NormalizationBridge):
    """Mixin for a norm bridge that computes the model's own norm, once, unless a point inside it is hooked.

    TransformerLens re-implements the norm, which rounds differently, or computes it twice to fire its inner points.
    """

    def forward(self, hidden_states: Tensor, **kwargs: object) -> Tensor:
        """Compute the norm [..., d_model], firing hook_in and hook_out."""
        inside_hooked = is_hooked(self.hook_scale) or is_hooked(self.hook_normalized)
        if inside_hooked or self.compatibility_mode or getattr(self.config, "layer_norm_folding", False):
            self.use_native_layernorm_autograd = True
            normed: Tensor = super().forward(hidden_states, **kwargs)
            return normed
        output: Tensor = self.hook_out(self.original_component(self.hook_in(hidden_states)))
        return output

    def _apply_weight_and_bias(self, hidden_states: Tensor, input_dtype: dtype) -> Tensor:
        """Finish an edited norm; norms without weights (OLMo's) only convert the dtype."""
        if getattr(self.original_component, "weight", None) is None:
            return hidden_states.to(input_dtype)
        scaled: Tensor = super()._apply_weight_and_bias(hidden_states, input_dtype)
        return scaled


class NativeGateUp(JointGateUpMLPBridge):
    """Mixin for the bridge of an MLP that fuses its gate and up projections: the model's own module computes.

    TransformerLens computes the two separately, which rounds differently on some processors.
    """

    def forward(self, *args: object, **kwargs: object) -> Any:
        """Compute the MLP's output [batch, pos, d_model], firing hook_in, hook_out and both projections' points."""
        projections = (self.gate, getattr(self, "in"))
        inputs_hooked = any(is_hooked(projection.hook_in) for projection in projections)
        processed = self.compatibility_mode or getattr(self, "_use_processed_weights", False)
        if inputs_hooked or processed or not self._is_gate_then_up():
            return super().forward(*args, **kwargs)
        points = [projection.hook_out for projection in projections]
        module, handle = self.original_component, None
        if any(is_hooked(point) for point in points):
            fused = getattr(module, self.fused_attr)
            handle = watch_parts(
                fused, points, lambda output: output.chunk(2, dim=-1), lambda halves: cat(halves, dim=-1)
            )
        try:
            return self.hook_out(module(self.hook_in(args[0]), *args[1:], **kwargs))
        finally:
            if handle is not None:
                handle.remove()

    def _is_gate_then_up(self) -> bool:
        """Return whether the fused projection is the gate projection followed by the up projection; checked once."""
        if "_halves" not in self.__dict__:
            fused = getattr(self.original_component, self.fused_attr).weight
            halves = [half.original_component.weight for half in (self.gate, getattr(self, "in"))]
            self.__dict__["_halves"] = equal(fused, cat(halves))
        return bool(self.__dict__["_halves"])
