"""Corrections to TransformerLens' attention component.

It always delegates to the model's own module, so that no family is re-implemented and no eager attention is needed, and
it streams statistics. Blocks are in `blocks`, norms and MLPs in `original_components`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge
from transformer_lens.model_bridge.generalized_components.position_embeddings_attention import (
    PositionEmbeddingsAttentionBridge,
)
from transformers import Cache

from phaselens.errors import InputError, RefusedModel
from phaselens.lens import attention_dispatch, families
from phaselens.lens.attention_facts import AttentionFacts
from phaselens.lens.attention_owner import StreamingOptions, is_hooked
from phaselens.lens.null_rotation import held_at
from phaselens.lens.original_components import watch_parts
from phaselens.lens.points import OWN_ATTENTION_POINTS, ROTATED_POINTS, STATISTICS, Hook, read_only_reason

if TYPE_CHECKING:
    from phaselens.lens.bridge import HookedTransformer


class _HookedCache:
    """A KV cache that lets `hook_rot_k` see, and edit, new keys before they are stored with the old ones."""

    def __init__(self, cache: Cache, point: HookPoint) -> None:
        self._cache = cache
        self._point = point

    def update(self, key: Tensor, value: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        return self._cache.update(self._point(key), value, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


class AttentionReplay:
    """The output of one layer's attention, computed in the first forward inside the context and reused in the others.

    It is for forwards that start from one residual and change nothing before attention's output. hook_out fires in
    each of them, the points inside attention only in the first.
    """

    def __init__(self, attention: StreamingAttention | None) -> None:
        self.output: Any = None
        self._attention = attention

    @contextmanager
    def active(self) -> Iterator[AttentionReplay]:
        """Let the attention keep its output, and reuse it, inside the context."""
        if self._attention is not None:
            self._attention.replay = self
        try:
            yield self
        finally:
            if self._attention is not None:
                self._attention.replay = None


class KernelReplay:
    """Results of the kernels of one layer's attention, computed once and shared by all forwards inside the context.

    It is for forwards that start from one residual and change no query, key or value of the layer.
    """

    def __init__(self, attention: StreamingAttention | None) -> None:
        self._attention = attention
        self._kernels: dict[Hashable, Any] = {}

    @contextmanager
    def active(self) -> Iterator[KernelReplay]:
        """Let the attention share the results of its kernels inside the context."""
        if self._attention is not None:
            self._attention.kernels = self._kernels
        try:
            yield self
        finally:
            if self._attention is not None:
                self._attention.kernels = None


class StreamingAttention(AttentionBridge):
    """Mixin for an attention bridge that delegates to the model's module and streams the statistics of its rows."""

    # DroPE's norm variants: TransformerLens' own computation would apply the unused norm too.
    always_delegate = False
    streaming_options: StreamingOptions
    nulled: bool
    #: cos and sin at position 0, each [1, 1, d_rotary] (or complex numbers), which `rotation.detect_rotation` stores.
    origin: tuple[Tensor, ...] | None
    replay: AttentionReplay | None
    kernels: dict[Hashable, Any] | None
    #: What the last forward added to the scores, [batch | 1, head | 1, 1 | query, key]; None in most models.
    score_bias: Tensor | None
    # From TransformerLens' component and from `add_points`.
    hook_key_scores: HookPoint
    hook_attn_scores: HookPoint
    hook_pattern: HookPoint
    hook_rot_q: HookPoint
    hook_rot_k: HookPoint
    hook_attended: HookPoint
    original_component: nn.Module

    def add_points(self) -> None:
        """Add the component's hook points; called once, on the template that layers are cloned from."""
        for name in (*OWN_ATTENTION_POINTS, *ROTATED_POINTS):
            if name not in self._modules:
                setattr(self, name, HookPoint())
        for name in (*STATISTICS, "hook_key_scores"):
            getattr(self, name).pos_dim = 2
        self.streaming_options = StreamingOptions()
        self.nulled = False
        self.origin = None
        self.replay = None
        self.kernels = None
        self.score_bias = None
        self._rot_k_fired = False

    def connect(self, options: StreamingOptions) -> None:
        """Share the lens' options, and let the model's module call the projections that TransformerLens wraps."""
        self.streaming_options = options
        for projection in (self.submodules.get("o"), self.submodules.get("qkv")):
            if projection is None:
                continue
            for name, child in self.original_component.named_children():
                if child is projection.original_component:
                    setattr(self.original_component, name, projection)

    @property
    def facts(self) -> AttentionFacts:
        """The sizes of the layer's attention, and the options of its softmax."""
        return AttentionFacts.of_module(self.original_component)

    def hooked_statistics(self) -> list[str]:
        """Return the names of the statistics that have hooks."""
        return [name for name in STATISTICS if is_hooked(getattr(self, name))]

    def fire_rotated(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Fire hook_rot_q and hook_rot_k (after rotation; equal to hook_q and hook_k where there is none)."""
        query = self.hook_rot_q(query)
        return query, key if self._rot_k_fired else self.hook_rot_k(key)

    def fire_statistic(self, name: str, value: Tensor) -> None:
        """Fire a statistic's hooks, which cannot change it: it is a measurement."""
        returned = getattr(self, name)(value)
        if returned is not value:
            raise InputError(
                f"{self.name}.{name}: a hook returned a new value; return None: {read_only_reason(f'attn.{name}')}"
            )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Delegate to the model's own attention, firing hook_in, hook_out and all points between."""
        replay = self.replay
        if replay is not None and replay.output is not None:
            residual = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            shape = _output_of(replay.output).shape[:-1]
            if residual.shape[:-1] != shape:
                raise InputError(
                    f"attention_replay: expected a residual of shape {list(shape)} (batch, pos), "
                    f"received {list(residual.shape[:-1])}; make a new one for each residual"
                )
            return self._fire_output(replay.output)
        embeddings = kwargs.get("position_embeddings")
        if self.nulled and embeddings is not None:
            kwargs["position_embeddings"] = self.without_rotation(embeddings)
        elif self.nulled and isinstance(kwargs.get("position_ids"), Tensor):
            # The module rotates by the positions themselves (GPT-J).
            kwargs["position_ids"] = torch.zeros_like(kwargs["position_ids"])
        if self._needs_eager_computation():
            return super().forward(*args, **kwargs)
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
                    kwargs[name] = _HookedCache(value, self.hook_rot_k)
                    rot_k_fired = True
        module = self.original_component
        fused = self._watch_fused_projection()
        # A hook may run another forward, which calls this method while this call is still running.
        outer, self._rot_k_fired = self._rot_k_fired, rot_k_fired
        try:
            with attention_dispatch.owning(module, self):
                output = module(*args, **kwargs)
        finally:
            self._rot_k_fired = outer
            if fused is not None:
                fused.remove()
        if replay is not None:
            replay.output = output
        return self._fire_output(output)

    def forget_call(self) -> None:
        """Forget a call that was interrupted."""
        self._rot_k_fired = False
        attention_dispatch.disown(self.original_component)

    def without_rotation(self, embeddings: Any) -> Any:
        """Return the rotation that the model computes at position 0, for every position, in the same form and shapes.

        This is cos = 1 and sin = 0, except in models (YaRN, longrope) that multiply both by an attention factor: they
        keep it, because it scales attention and does not rotate.
        """
        if self.origin is None:
            raise RefusedModel(
                "the rotation of a layer was nulled before its cos and sin at position 0 were read; null it with "
                "load(positions='nope') or lens.set_rotation(nulled=True)"
            )
        return held_at(self.origin, embeddings)

    def _fire_output(self, output: Any) -> Any:
        if isinstance(output, Tensor):
            return self.hook_out(output)
        fired = [self.hook_out(output[0]), *output[1:]]
        return fired if isinstance(output, list) else tuple(fired)

    def needs_bridge(self) -> bool:
        """Return whether the model's own module cannot replace this component even where no hook listens."""
        return bool(self.eager_reason() or self.replay is not None)

    def eager_reason(self) -> str:
        """Return the options that require TransformerLens' own (eager) attention, which has no statistics, or ""."""
        options = ("use_split_qkv_input", "use_attn_in", "use_attn_result")
        names = [option for option in options if getattr(self.config, option, False)]
        return ", ".join(names) or ("compatibility mode" if self.compatibility_mode else "")

    def _needs_eager_computation(self) -> bool:
        """Return whether TransformerLens' own (eager) computation must run, due to the options of `eager_reason`."""
        reason = self.eager_reason()
        if not reason:
            return False
        if self.always_delegate and self.has_norms:
            raise RefusedModel(
                f"{self.name}: {reason} is not available for DroPE models with query or key norms; "
                "load the model without it"
            )
        unserved = [name for name in OWN_ATTENTION_POINTS if is_hooked(getattr(self, name))]
        if unserved:
            raise RefusedModel(
                f"{self.name}: {', '.join(unserved)} cannot be served under {reason}; switch that off"
            )
        return True

    @property
    def has_norms(self) -> bool:
        """Whether the module is a DroPE attention with query or key norms."""
        return bool(getattr(self.original_component, "normed", ""))

    def _watch_fused_projection(self) -> RemovableHandle | None:
        """Fire the hook points of q, k and v on the parts of one projection, in models that fuse the three."""
        if "qkv" not in self.submodules:
            return None
        points = [projection.hook_out for projection in (self.q, self.k, self.v)]
        if not any(is_hooked(point) for point in points):
            return None
        layout = families.fused_layout(self.original_component)
        return watch_parts(self.qkv, points, layout.split, layout.join)


def _output_of(result: Any) -> Tensor:
    """Return the output [batch, pos, d_model] of an attention module from what it returns: a tensor, or a tuple."""
    output: Tensor = result if isinstance(result, Tensor) else result[0]
    return output


def mix_in(component: nn.Module, mixin: type) -> None:
    """Put `mixin` in front of the class of `component`, in place."""
    cls = type(component)
    if not issubclass(cls, mixin):
        component.__class__ = _mixed_class(cls, mixin)
    if isinstance(component, StreamingAttention):
        component.add_points()


_MIXED_CLASSES: dict[tuple[type, type], type] = {}


def _mixed_class(cls: type, mixin: type) -> type:
    """Return one class for each pair, so that copies of a component share their class."""
    if (cls, mixin) not in _MIXED_CLASSES:
        _MIXED_CLASSES[cls, mixin] = type(f"{mixin.__name__}{cls.__name__}", (mixin, cls), {})
    return _MIXED_CLASSES[cls, mixin]


class DroPEAttentionBridge(StreamingAttention, PositionEmbeddingsAttentionBridge):
    """Attention of DroPE models, for TransformerLens' own loading path as well."""

    rope_optional = True
    always_delegate = True

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.add_points()


def attention_of(block: nn.Module) -> StreamingAttention | None:
    """Return the attention component of a block; None where the layer has no attention."""
    attention = block._modules.get("attn")
    return attention if isinstance(attention, StreamingAttention) else None


def attention_layers(lens: HookedTransformer) -> dict[int, StreamingAttention]:
    """Return the attention components of a model by layer, of the layers that have attention."""
    by_layer = {layer: attention_of(block) for layer, block in enumerate(lens.blocks)}
    return {layer: attention for layer, attention in by_layer.items() if attention is not None}


def probe(lens: HookedTransformer, tokens: Tensor, hooks: Sequence[Hook] = (), **options: object) -> None:
    """Run the model's body once with `hooks` on `tokens` [batch, pos], none of which is a pad.

    Args:
        options: more arguments of the model, such as position_ids.
    """
    with torch.no_grad(), lens.hooks(fwd_hooks=list(hooks)), lens.rows.with_lengths(None):
        families.body_of(lens.original_model)(input_ids=tokens, use_cache=False, **options)
