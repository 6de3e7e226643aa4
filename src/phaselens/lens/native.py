"""TransformerLens' norms and MLPs that compute in their own way, mended: the model's own module computes, once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, cat, equal

from phaselens.lens.interface import is_hooked


def watch_parts(
    module: Any,
    points: Sequence[Any],
    split: Callable[[Tensor], Sequence[Tensor]],
    join: Callable[[list[Tensor]], Tensor],
) -> Any:
    """Fire `points` on the parts of what `module` gives, which holds several projections in one, until the handle that
    is returned is removed."""

    def fire(_module: Any, _args: Any, fused: Tensor) -> Tensor:
        parts = split(fused)
        edited = [point(part) for point, part in zip(points, parts, strict=True)]
        # The parts are views: what a hook wrote in place stands in `fused` already.
        untouched = all(new is old for new, old in zip(edited, parts, strict=True))
        return fused if untouched else join(edited)

    return module.register_forward_hook(fire)


class NativeNorm:
    """Mixed into a norm bridge: the model's own norm, computed once, unless somebody looks inside it.

    TransformerLens computes the norm in its own way, which rounds differently, or a second time to show its parts.
    """

    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Norm [..., d_model], firing hook_in and hook_out."""
        inside = is_hooked(self.hook_scale) or is_hooked(self.hook_normalized)
        if inside or self.compatibility_mode or getattr(self.config, "layer_norm_folding", False):
            self.use_native_layernorm_autograd = True
            normed: Tensor = super().forward(hidden_states, **kwargs)  # type: ignore[misc]
            return normed
        out: Tensor = self.hook_out(self.original_component(self.hook_in(hidden_states)))
        return out

    def _apply_weight_and_bias(self: Any, hidden_states: Tensor, input_dtype: Any) -> Tensor:
        """The rest of an edited norm, where the norm has weights (OLMo's has none)."""
        if getattr(self.original_component, "weight", None) is None:
            return hidden_states.to(input_dtype)
        scaled: Tensor = super()._apply_weight_and_bias(hidden_states, input_dtype)  # type: ignore[misc]
        return scaled


class NativeGateUp:
    """Mixed into the bridge of an MLP whose gate and up projections are one: the model's own module.

    TransformerLens computes the two apart, which rounds differently on some processors.
    """

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """What the MLP adds [batch, pos, d_model], firing hook_in, hook_out and the points of both projections."""
        parts = (self.gate, getattr(self, "in"))
        apart = any(is_hooked(part.hook_in) for part in parts)
        processed = self.compatibility_mode or getattr(self, "_use_processed_weights", False)
        if apart or processed or not self._is_gate_then_up():
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        points = [part.hook_out for part in parts]
        module, watched = self.original_component, None
        if any(is_hooked(point) for point in points):
            fused = getattr(module, self.fused_attr)
            watched = watch_parts(
                fused, points, lambda both: both.chunk(2, dim=-1), lambda edited: cat(edited, dim=-1)
            )
        try:
            return self.hook_out(module(self.hook_in(args[0]), *args[1:], **kwargs))
        finally:
            if watched is not None:
                watched.remove()

    def _is_gate_then_up(self: Any) -> bool:
        """Whether the two projections are the first and the second half of the one; looked at once."""
        if "_halves" not in self.__dict__:
            whole = getattr(self.original_component, self.fused_attr).weight
            halves = [part.original_component.weight for part in (self.gate, getattr(self, "in"))]
            self.__dict__["_halves"] = equal(whole, cat(halves))
        return bool(self.__dict__["_halves"])
