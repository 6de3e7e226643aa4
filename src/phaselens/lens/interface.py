"""The attention function that transformers calls, in place of its own, in every model the lens wraps.

It fires the hook points inside attention and picks, layer by layer, the cheapest computation that serves them:

* nobody hooks a statistic or the matrix: transformers' own SDPA, bit for bit what the model does without us (or, for
  softcapped scores and learned sink logits, which SDPA cannot do, the exact streaming computation);
* ``hook_lse``, ``hook_sink``, ``hook_entropy``, ``hook_received``, ``hook_distance``: the fused kernel with its
  log-sum-exp, O(L) memory;
* ``hook_attn_scores`` or ``hook_pattern``: the explicit matrix, in that layer only.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from phaselens import attention
from phaselens.errors import InputError, RefusedModel
from phaselens.lens.masks import build_mask, note_mask
from phaselens.lens.slots import KeySlots

if TYPE_CHECKING:
    from phaselens.lens.components import StreamingAttention

NAME = "phaselens"

# Where the running bridge component stands for the duration of one call of its module. A weak reference: a plain one
# would tie model and bridge into a cycle that keeps both alive.
OWNER = "_phaselens_owner"


def is_hooked(point: Any) -> bool:
    """Whether anything listens at this hook point."""
    return bool(point._forward_hooks or point._backward_hooks)


def version_of(tensor: Tensor) -> int | None:
    """How often `tensor` was written into; None under `torch.inference_mode`, where PyTorch does not count."""
    return None if tensor.is_inference() else tensor._version


def attend_hooked(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend, firing the hook points of whichever bridge component is running `module`.

    Args:
        query: [batch, n_heads, n_queries, d_head], after rotation and norms.
        key, value: [batch, n_kv_heads, n_keys, d_head].
        attention_mask: None for causal attention; else bool, True where visible, or additive.

    Returns:
        The output [batch, n_queries, n_heads, d_head] and, where it was built, the pattern.
    """
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    if is_causal is False or getattr(module, "is_causal", True) is False:
        raise RefusedModel(
            f"{type(module).__name__} attends in both directions; PhaseLens serves causal attention only"
        )
    scores_kw: dict[str, Any] = {"scale": scaling, "mask": attention_mask, "softcap": softcap, "sinks": s_aux}
    reference = module.__dict__.get(OWNER)
    owner: StreamingAttention | None = reference() if reference is not None else None
    note_mask(module, attention_mask)
    plain = functools.partial(_plain, module, dropout, is_causal, kwargs)
    if owner is None:
        if attention_mask is None and query.shape[2] > 1:
            # transformers leaves the mask out where the first query stands at the first key; a static cache then has
            # room for keys that come later.
            key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
        return plain(query, key, value, scores_kw), None

    slots = KeySlots.of(owner.request.rows, key)
    if attention_mask is None and 1 < query.shape[2] < slots.n_kept:
        raise RefusedModel(
            f"{type(module).__name__} passed {query.shape[2]} queries and {key.shape[2]} keys without a mask; "
            "which key the first query stands at is unknown"
        )
    query, key = owner.fire_rotated(query, key)
    out, pattern = _observed(owner, slots, plain, query, key, value, scores_kw)
    return owner.hook_attended(out), pattern


def _observed(
    owner: StreamingAttention,
    slots: KeySlots,
    plain: Callable[[Tensor, Tensor, Tensor, dict[str, Any]], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores_kw: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Attend by the cheapest computation that serves whoever listens to the owner's statistics or matrix; `plain` is
    what the model itself computes."""
    explicit = is_hooked(owner.hook_attn_scores) or is_hooked(owner.hook_pattern)
    wanted = owner.hooked_statistics()
    native = scores_kw["softcap"] is None and scores_kw["sinks"] is None
    if not explicit and not wanted and native:
        return plain(query, key, value, scores_kw), None
    key, value, scores_kw = slots.crop(key), slots.crop(value), slots.crop_mask(scores_kw)
    pattern = None
    if explicit:
        scores, pattern, edited = _fire_matrix(owner, slots, query, key, scores_kw)
        if edited or not owner.request.reads_only or _needs_gradient(query, key, value):
            return _from_matrix(owner, slots, scores, pattern, value, scores_kw)
    if not wanted:
        return plain(query, key, value, scores_kw), pattern
    if _needs_gradient(query, key, value):
        # The fused kernel's log-sum-exp carries no gradient. The output keeps its own; the statistics are constants,
        # on which a backward pass fails loudly instead of being wrong.
        out = plain(query, key, value, scores_kw)
        with torch.no_grad():
            query, key, value = query.detach(), key.detach(), value.detach()
            _, lse = attention.attend(query, key, value, **scores_kw)
            _fire_statistics(owner, slots, wanted, query, key, lse, scores_kw)
        return out, None
    with torch.no_grad():
        out, lse = attention.attend(query, key, value, **scores_kw)
        _fire_statistics(owner, slots, wanted, query, key, lse, scores_kw)
    return out.transpose(1, 2).contiguous(), pattern


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _plain(
    module: Any,
    dropout: float,
    is_causal: bool | None,
    kwargs: dict[str, Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores_kw: dict[str, Any],
) -> Tensor:
    """What the model itself computes, [batch, query, head, d_head]."""
    if scores_kw["softcap"] is None and scores_kw["sinks"] is None:
        out, _ = sdpa_attention_forward(
            module, query, key, value, scores_kw["mask"], dropout=dropout, scaling=scores_kw["scale"],
            is_causal=is_causal, **kwargs,
        )  # fmt: skip
        return out
    if dropout:
        raise InputError(
            f"{type(module).__name__}: attention dropout needs a model in eval mode; call model.eval()"
        )
    if _needs_gradient(query, key, value):
        scores = attention.explicit_scores(query, key, **_without_sinks(scores_kw))
        pattern = attention.explicit_pattern(scores, sinks=scores_kw["sinks"])
        return _weigh(pattern, value).transpose(1, 2).contiguous()
    out, _ = attention.attend(query, key, value, **scores_kw)
    return out.transpose(1, 2).contiguous()


def _without_sinks(scores_kw: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in scores_kw.items() if name != "sinks"}


def _weigh(pattern: Tensor, value: Tensor) -> Tensor:
    """[batch, head, query, d_head] in value's dtype; keys and values of grouped heads are shared."""
    groups = pattern.shape[1] // value.shape[1]
    return pattern.to(value.dtype) @ value.repeat_interleave(groups, dim=1)


def _fire_matrix(
    owner: StreamingAttention, slots: KeySlots, query: Tensor, key: Tensor, scores_kw: dict[str, Any]
) -> tuple[Tensor, Tensor, bool]:
    """Scores and weights [batch, head, query, key], because somebody looks at them, and whether a hook edited them (or
    may have: under `torch.inference_mode`, writes in place leave no trace).

    Hooks see a column for every position of the text so far. Those of keys that a sliding cache has let go are hidden,
    as the window hides them without a cache.
    """
    built = slots.with_dropped(attention.explicit_scores(query, key, **_without_sinks(scores_kw)), -torch.inf)
    version = version_of(built)
    scores = owner.hook_attn_scores(built)
    edited = scores is not built or version is None or version_of(built) != version
    _require_untouched(owner, "hook_attn_scores", scores[..., : slots.n_dropped], -torch.inf)
    built = attention.explicit_pattern(scores, sinks=scores_kw["sinks"])
    version = version_of(built)
    pattern = owner.hook_pattern(built)
    edited = edited or pattern is not built or version is None or version_of(built) != version
    _require_untouched(owner, "hook_pattern", pattern[..., : slots.n_dropped], 0.0)
    return scores, pattern, edited


def _from_matrix(
    owner: StreamingAttention,
    slots: KeySlots,
    scores: Tensor,
    pattern: Tensor,
    value: Tensor,
    scores_kw: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """The output, and all that is streamed elsewhere, from the matrix itself: they follow its edits."""
    out = _weigh(pattern[..., slots.n_dropped :], value).transpose(1, 2).contiguous()
    wanted = owner.hooked_statistics()
    if wanted:
        request = owner.request
        with torch.no_grad():
            counted = functools.cache(lambda: _counted(pattern, slots.real))
            compute: dict[str, Callable[[], Tensor]] = {
                "hook_lse": lambda: _row_lse(scores, scores_kw["sinks"]),
                "hook_sink": lambda: _columns(pattern, slots.at(request.sink_position)),
                "hook_entropy": lambda: torch.special.entr(pattern).sum(-1),
                "hook_received": lambda: counted().sum(-2),
                "hook_distance": lambda: _by_distance(counted(), request.n_distances),
            }
            slots.require_served(wanted)
            for name in wanted:
                owner.fire_statistic(name, compute[name]())
    return out, pattern


def _require_untouched(owner: Any, point: str, dropped: Tensor, value: float) -> None:
    """An edit cannot bring back keys that the cache has let go."""
    if dropped.numel() and bool((dropped != value).any()):
        raise InputError(
            f"{owner.name}.{point}: the edit looks at keys that have left this layer's sliding cache; edit only the "
            f"last {owner.request.rows.n_slots - dropped.shape[-1]} keys, or run without a cache "
            "(use_past_kv_cache=False)"
        )


def _row_lse(scores: Tensor, sinks: Tensor | None) -> Tensor:
    lse = scores.logsumexp(-1)
    return lse if sinks is None else torch.logaddexp(lse, sinks.to(lse.dtype)[None, :, None])


def _counted(pattern: Tensor, real: Tensor | None) -> Tensor:
    """The pattern with the rows of pads as zeros."""
    return pattern if real is None else pattern.masked_fill(~real[:, None, :, None], 0.0)


def _by_distance(counted: Tensor, n: int) -> Tensor:
    """[batch, head, distance], sums over the diagonals below and on the one of a query's own key."""
    own_key = counted.shape[-1] - counted.shape[-2]
    sums = [
        counted.diagonal(own_key - back, dim1=-2, dim2=-1).sum(-1)
        for back in range(min(n, counted.shape[-1]))
    ]
    return torch.nn.functional.pad(torch.stack(sums, -1), (0, n - len(sums)))


def _columns(pattern: Tensor, slots: list[int]) -> Tensor:
    """[batch, head, query]: the column of each text's slot; zeros where there is none."""
    if len(slots) == 1:
        inside = 0 <= slots[0] < pattern.shape[-1]
        return pattern[..., slots[0]] if inside else pattern.new_zeros(pattern.shape[:-1])
    rows = [_columns(pattern[row : row + 1], [slot]) for row, slot in enumerate(slots)]
    return torch.cat(rows)


def _fire_statistics(
    owner: StreamingAttention,
    slots: KeySlots,
    wanted: list[str],
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    scores_kw: dict[str, Any],
) -> None:
    request = owner.request
    slots.require_served(wanted)
    sink_at = [slot - slots.n_dropped for slot in slots.at(request.sink_position)]
    shared = len(sink_at) == 1 and 0 <= sink_at[0] < key.shape[2]
    summary = attention.summarise(
        query,
        key,
        lse,
        position=sink_at[0] if "hook_sink" in wanted and shared else None,
        entropy="hook_entropy" in wanted,
        received="hook_received" in wanted,
        distances=request.n_distances if "hook_distance" in wanted else None,
        refine="hook_lse" in wanted,
        real=slots.real,
        **scores_kw,
    )
    sink = summary.sink
    if "hook_sink" in wanted and not shared:
        sink = _sink_by_text(query, key, lse, sink_at, scores_kw)
    received = summary.received
    values = {
        "hook_lse": summary.lse,
        "hook_sink": sink,
        "hook_entropy": summary.entropy,
        "hook_received": None if received is None else slots.with_dropped(received, 0.0),
        "hook_distance": summary.distance,
    }
    for name, value in values.items():
        if name in wanted and value is not None:
            owner.fire_statistic(name, value)


def _sink_by_text(
    query: Tensor, key: Tensor, lse: Tensor, sink_at: list[int], scores_kw: dict[str, Any]
) -> Tensor:
    """[batch, head, query]: the mass on a key of its own for each text; 0 where the text has no such key (or no longer:
    what a sliding cache has let go is outside of the window)."""
    sink = torch.zeros_like(lse)
    indices = sink_at if len(sink_at) > 1 else sink_at * len(lse)
    for index in sorted(set(indices)):
        if not 0 <= index < key.shape[2]:
            continue
        rows = torch.tensor([row for row, at in enumerate(indices) if at == index], device=lse.device)
        mask = scores_kw["mask"]
        options = {**scores_kw, "mask": mask if mask is None or len(mask) == 1 else mask[rows]}
        sink[rows] = attention.sink_mass(query[rows], key[rows], lse[rows], index, **options)
    return sink


@contextmanager
def owned(module: Any, owner: StreamingAttention) -> Iterator[None]:
    """Inside, calls of `module` fire `owner`'s hook points. It can be entered again by a forward within a hook."""
    before = module.__dict__.get(OWNER)
    module.__dict__[OWNER] = weakref.ref(owner)
    try:
        yield
    finally:
        if before is None:
            del module.__dict__[OWNER]
        else:
            module.__dict__[OWNER] = before


AttentionInterface.register(NAME, attend_hooked)
# Without this, transformers would drop padding masks for an attention it does not know, without a word.
AttentionMaskInterface.register(NAME, build_mask)
