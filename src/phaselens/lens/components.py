"""TransformerLens' attention component, mended: it always delegates to the model's own module, so that no family is
re-implemented and nothing forces eager attention, and it streams statistics. Blocks are in `blocks`, norms and MLPs in
`native`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components.position_embeddings_attention import (
    PositionEmbeddingsAttentionBridge,
)
from transformers import Cache

from phaselens.errors import InputError, RefusedModel
from phaselens.lens import families, interface
from phaselens.lens.interface import is_hooked
from phaselens.lens.native import watch_parts
from phaselens.lens.rows import Rows

STATISTICS = ("hook_lse", "hook_sink", "hook_entropy", "hook_received", "hook_distance")
DELEGATED = (*STATISTICS, "hook_attended")
"""Points that fire only where the model's own attention runs, and not TransformerLens'."""
N_DISTANCES = 64
"""Distances of `hook_distance`, where nobody asks for another number."""


@dataclass
class Request:
    """What one forward asks of the statistics; one object, shared by a lens' layers.

    ``sink_position`` is the absolute position of the key that `hook_sink` measures; ``n_distances`` how many distances
    `hook_distance` has; ``rows`` knows where the rows of the running forward stand, and which of them are pads, whose
    queries are left out of `hook_received` and `hook_distance`. ``reads_only`` says that hooks write into nothing in
    place: a matrix that is looked at and not edited then leaves no trace in what the layer computes.
    """

    sink_position: int = 0
    n_distances: int = N_DISTANCES
    reads_only: bool = False
    rows: Rows = field(default_factory=Rows)


class _CacheTap:
    """A KV cache that lets `hook_rot_k` see, and edit, new keys before they are stored with the old ones."""

    def __init__(self, cache: Any, point: Any) -> None:
        self._cache = cache
        self._point = point

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._cache.update(self._point(key), value, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


class AttentionReplay:
    """What one layer's attention gives, computed in the first pass that is made inside, and given again in all others.

    For passes whose residual below the layer is the same, and that change nothing before attention's output. hook_out
    fires in each of them, the points inside attention only in the first.
    """

    def __init__(self, attention: StreamingAttention) -> None:
        self.output: tuple[Any, ...] | None = None
        self._attention = attention

    def __enter__(self) -> AttentionReplay:
        self._attention.replay = self
        return self

    def __exit__(self, *_: object) -> None:
        self._attention.replay = None


class StreamingAttention:
    """Mixed into an attention bridge: delegates to the model's module, and streams the statistics of its rows."""

    # DroPE's norm variants: TransformerLens' own computation would apply the unused norm too.
    always_delegate = False
    request: Request
    nulled: bool
    origin: tuple[Tensor, Tensor] | None
    replay: AttentionReplay | None
    # From TransformerLens' component and from `add_points`.
    hook_attn_scores: Any
    hook_pattern: Any
    hook_rot_q: Any
    hook_rot_k: Any
    hook_attended: Any
    original_component: Any

    def add_points(self: Any) -> None:
        """Give the component its hook points; called once, on the template that layers are cloned from."""
        for name in (*STATISTICS, "hook_rot_q", "hook_rot_k", "hook_attended"):
            if name not in self._modules:
                setattr(self, name, HookPoint())
        for name in STATISTICS:
            getattr(self, name).pos_dim = 2
        self.request = Request()
        self.nulled = False
        # cos and sin at position 0, each [1, 1, d_rotary], which `positions.detect` notes.
        self.origin = None
        self.replay = None
        self._rot_k_fired = False

    def adopt(self: Any, request: Request) -> None:
        """Share the lens' request; and let the module call our projections where TransformerLens calls them itself."""
        self.request = request
        for part in (self.o, self.submodules.get("qkv")):
            if part is None:
                continue
            for name, child in self.original_component.named_children():
                if child is part.original_component:
                    setattr(self.original_component, name, part)

    def hooked_statistics(self) -> list[str]:
        """Names of the statistics that somebody listens to."""
        return [name for name in STATISTICS if is_hooked(getattr(self, name))]

    def fire_rotated(self: Any, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Fire hook_rot_q and hook_rot_k (after rotation; equal to hook_q and hook_k where there is none)."""
        query = self.hook_rot_q(query)
        return query, key if self._rot_k_fired else self.hook_rot_k(key)

    def fire_statistic(self: Any, name: str, value: Tensor) -> None:
        """Hand a statistic to its listeners. It is a measurement: nothing of the model follows from it."""
        seen = getattr(self, name)(value)
        if seen is not value:
            raise InputError(
                f"{self.name}.{name}: a hook returned a new value, but this point is a measurement and nothing follows "
                "from it; return None, and edit hook_pattern or hook_attn_scores instead"
            )

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Delegate to the model's own attention, firing hook_in, hook_out and all points between."""
        replay = self.replay
        if replay is not None and replay.output is not None:
            given = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            if given.shape[:-1] != replay.output[0].shape[:-1]:
                raise InputError(
                    f"attention_replay: kept for {list(replay.output[0].shape[:-1])} (batch, pos), asked for "
                    f"{list(given.shape[:-1])}; make a new one for each residual"
                )
            return self._handed_on(replay.output)
        embeddings = kwargs.get("position_embeddings")
        if self.nulled and embeddings is not None:
            kwargs["position_embeddings"] = self.without_rotation(embeddings)
        if self._wants_own_computation():
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        if "hidden_states" in kwargs:
            kwargs["hidden_states"] = self.hook_in(kwargs["hidden_states"])
        else:
            args = (self.hook_in(args[0]), *args[1:])
        if kwargs.get("position_embeddings") is not None:
            kwargs["position_embeddings"] = self._apply_position_embedding_hooks(
                kwargs["position_embeddings"]
            )
        rot_k_fired = False
        if is_hooked(self.hook_rot_k):
            # Families name the argument differently: past_key_values, layer_past, …
            for name, value in kwargs.items():
                if isinstance(value, Cache):
                    kwargs[name] = _CacheTap(value, self.hook_rot_k)
                    rot_k_fired = True
        module = self.original_component
        fused = self._watch_fused_projection()
        # A hook may run a forward of its own, which comes through here while this one is not over.
        outer, self._rot_k_fired = self._rot_k_fired, rot_k_fired
        try:
            with interface.owned(module, self):
                out = module(*args, **kwargs)
        finally:
            self._rot_k_fired = outer
            if fused is not None:
                fused.remove()
        if replay is not None:
            replay.output = out
        return self._handed_on(out)

    def without_rotation(self, embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """(cos, sin) → what the model gives at position 0, for every position, of the same shapes.

        That is cos=1 and sin=0, but for models (YaRN, longrope) that multiply both by an attention factor: they keep
        it, for it scales attention and does not rotate.
        """
        if self.origin is None:
            raise RefusedModel(
                "the rotation of a layer was nulled before anybody looked at it; null it by load(positions='nope') or "
                "phaselens.lens.positions.null_rotation"
            )
        cos, sin = (
            at_origin.to(part).expand_as(part).clone()
            for at_origin, part in zip(self.origin, embeddings, strict=True)
        )
        return cos, sin

    def _handed_on(self: Any, out: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.hook_out(out[0]), *out[1:])

    def needs_itself(self: Any) -> bool:
        """Whether the model's own module would not do in its place, even where nobody listens."""
        return bool(self.own_computation_reason() or self.replay is not None)

    def _own_options(self: Any) -> list[str]:
        """Options that are on and need the parts of TransformerLens' own computation."""
        options = ("use_split_qkv_input", "use_attn_in", "use_attn_result")
        return [option for option in options if getattr(self.config, option, False)]

    def own_computation_reason(self: Any) -> str:
        """Why TransformerLens' own (eager) computation must run, which has no statistics; empty where it need not."""
        return ", ".join(self._own_options()) or ("compatibility mode" if self.compatibility_mode else "")

    def _wants_own_computation(self: Any) -> bool:
        """Whether TransformerLens' own (eager) computation must run: only for the options that need its parts."""
        why = self.own_computation_reason()
        if not why:
            return False
        if self.always_delegate and self.normalises:
            raise RefusedModel(
                f"{self.name}: {why} is not available for DroPE models with query or key norms; "
                "load the model without it"
            )
        unserved = [name for name in DELEGATED if is_hooked(getattr(self, name))]
        if unserved:
            raise RefusedModel(
                f"{self.name}: {', '.join(unserved)} cannot be served under {why}; switch that off"
            )
        return True

    @property
    def normalises(self: Any) -> bool:
        """Whether the module is a DroPE attention with query or key norms."""
        return bool(getattr(self.original_component, "normed", ""))

    def _watch_fused_projection(self: Any) -> Any:
        """Where q, k and v come from one projection: fire their three hook points on its parts."""
        points = [part.hook_out for part in (self.q, self.k, self.v)]
        if "qkv" not in self.submodules or not any(is_hooked(point) for point in points):
            return None
        layout = families.fused_layout(self.original_component)
        return watch_parts(self.qkv, points, layout.split, layout.join)


def mixed(component: Any, mixin: type) -> None:
    """Turn `component` into an instance of its own class with `mixin` in front."""
    cls = type(component)
    if not issubclass(cls, mixin):
        component.__class__ = _mixed_class(cls, mixin)
    if isinstance(component, StreamingAttention):
        component.add_points()


_CLASSES: dict[tuple[type, type], type] = {}


def _mixed_class(cls: type, mixin: type) -> type:
    """One class a pair, so that copies of a component still share theirs."""
    if (cls, mixin) not in _CLASSES:
        _CLASSES[cls, mixin] = type(f"{mixin.__name__}{cls.__name__}", (mixin, cls), {})
    return _CLASSES[cls, mixin]


class DroPEAttentionBridge(StreamingAttention, PositionEmbeddingsAttentionBridge):
    """Attention of DroPE models, for TransformerLens' own loading path as well."""

    rope_optional = True
    always_delegate = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_points()


def each_attention(bridge: Any) -> list[StreamingAttention]:
    """The attention components of a bridge, layer by layer."""
    return [cast(StreamingAttention, block.attn) for block in bridge.blocks]


def probe(bridge: Any, tokens: Tensor, hooks: Sequence[tuple[str, Any]] = (), **options: Any) -> None:
    """Run the model's body once on `tokens` [batch, pos], all of them a text's own, for what `hooks` see or edit.

    Args:
        options: more arguments of the model, such as position_ids.
    """
    with torch.no_grad(), bridge.hooks(fwd_hooks=list(hooks)), bridge.rows.reading(None):
        bridge.original_model.base_model(input_ids=tokens, use_cache=False, **options)
