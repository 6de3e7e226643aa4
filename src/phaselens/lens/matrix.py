"""The explicit matrix of one layer's attention: its hook points, and output and statistics that follow its edits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from phaselens import attention
from phaselens.errors import InputError
from phaselens.lens.attention_owner import AttentionOwner, version_of
from phaselens.lens.matrix_statistics import by_distance, columns, row_lse, without_pads
from phaselens.lens.slots import KernelOptions, KeySlots

if TYPE_CHECKING:
    from phaselens.lens.key_edits import KeyEdit


def without_sink_logits(options: KernelOptions) -> dict[str, Any]:
    """Return the options of scores, which sink logits do not enter."""
    return {name: value for name, value in options.items() if name != "sink_logits"}


def weigh(pattern: Tensor, value: Tensor) -> Tensor:
    """Return pattern times value, [batch, head, query, d_head], in value's dtype; grouped heads share their values."""
    groups = pattern.shape[1] // value.shape[1]
    return pattern.to(value.dtype) @ value.repeat_interleave(groups, dim=1)


def fire_matrix(
    owner: AttentionOwner,
    slots: KeySlots,
    query: Tensor,
    key: Tensor,
    options: KernelOptions,
    key_edit: KeyEdit | None,
) -> tuple[Tensor, Tensor, bool]:
    """Return scores and weights [batch, head, query, key] after their hooks, and whether a hook may have edited them.

    Scores that `hook_key_scores` has edited are in the matrix. Under `torch.inference_mode`, which records no writes in
    place, this is always True. Hooks see a column for every position of the text so far. Columns of keys that a sliding
    cache has dropped are hidden, as the window hides them without a cache.
    """
    kept_scores = attention.explicit_scores(query, key, **without_sink_logits(options))
    if key_edit is not None:
        kept_scores = key_edit.written_to(kept_scores)
    built = slots.with_dropped(kept_scores, -torch.inf)
    version = version_of(built)
    scores = owner.hook_attn_scores(built)
    edited = key_edit is not None or scores is not built or version is None or version_of(built) != version
    _require_untouched(owner, "hook_attn_scores", scores[..., : slots.n_dropped], -torch.inf)
    built = attention.explicit_pattern(scores, sink_logits=options["sink_logits"])
    version = version_of(built)
    pattern = owner.hook_pattern(built)
    edited = edited or pattern is not built or version is None or version_of(built) != version
    _require_untouched(owner, "hook_pattern", pattern[..., : slots.n_dropped], 0.0)
    return scores, pattern, edited


def from_matrix(
    owner: AttentionOwner,
    slots: KeySlots,
    scores: Tensor,
    pattern: Tensor,
    value: Tensor,
    options: KernelOptions,
    largest: Callable[[], Tensor],
) -> tuple[Tensor, Tensor]:
    """Return the output and the pattern, and fire the statistics, from the matrix, so that they follow its edits.

    `largest` returns the largest products, which are those of queries and keys, before any edit of the matrix.
    """
    output = weigh(pattern[..., slots.n_dropped :], value).transpose(1, 2).contiguous()
    statistics = owner.hooked_statistics()
    if statistics:
        streaming = owner.streaming_options
        with torch.no_grad():
            pattern_without_pads = functools.cache(lambda: without_pads(pattern, slots.real))
            compute: dict[str, Callable[[], Tensor]] = {
                "hook_lse": lambda: row_lse(scores, options["sink_logits"]),
                "hook_learned_sink": lambda: learned_sink_mass(
                    row_lse(scores, options["sink_logits"]), options
                ),
                "hook_sink": lambda: columns(pattern, slots.slots_at(streaming.sink_position)),
                "hook_itself": lambda: pattern.diagonal(
                    pattern.shape[-1] - pattern.shape[-2], dim1=-2, dim2=-1
                ),
                "hook_entropy": lambda: torch.special.entr(pattern).sum(-1),
                "hook_received": lambda: pattern_without_pads().sum(-2),
                "hook_distance": lambda: by_distance(pattern_without_pads(), streaming.n_distances),
                "hook_segments": lambda: _by_segment(
                    pattern[..., slots.n_dropped :],
                    slots.segment_labels(pattern.device),
                    slots.n_segments,
                ),
                "hook_top_key": lambda: at_positions(_top_key(pattern[..., slots.n_dropped :]), slots),
                "hook_largest_product": largest,
            }
            slots.require_served(statistics)
            for name in statistics:
                owner.fire_statistic(name, compute[name]())
    return output, pattern


def largest_products(query: Tensor, key: Tensor, options: KernelOptions) -> Tensor:
    """Return the largest |q·k| [batch, head, query] over the keys that each query sees; NaN if it sees none."""
    is_visible = attention.explicit_scores(query, key, **without_sink_logits(options)) != -torch.inf
    products = attention.explicit_scores(query, key, scale=1.0, mask=torch.ones_like(is_visible)).abs()
    return products.masked_fill(~is_visible, -torch.inf).amax(-1).masked_fill(~is_visible.any(-1), torch.nan)


def _require_untouched(owner: AttentionOwner, point: str, dropped: Tensor, value: float) -> None:
    """Raise InputError if a hook edited the columns of keys that the cache has dropped."""
    if dropped.numel() and bool((dropped != value).any()):
        raise InputError(
            f"{owner.name}.{point}: the hook edited keys that have left this layer's sliding cache; edit only the "
            f"last {owner.streaming_options.rows.n_slots - dropped.shape[-1]} keys, or run without a cache "
            "(use_past_kv_cache=False)"
        )


def learned_sink_mass(lse: Tensor, options: KernelOptions) -> Tensor:
    """Return the share [batch, head, query] of each row's attention on its head's sink logit; 0 without one.

    NaN where the row is NaN.
    """
    sink_logits = options["sink_logits"]
    if sink_logits is None:
        return torch.zeros_like(lse).masked_fill(lse.isnan(), torch.nan)
    return (sink_logits.to(lse.dtype)[None, :, None] - lse).exp()


def _by_segment(pattern: Tensor, labels: Tensor, n_segments: int) -> Tensor:
    """Return sums over the columns of each segment, [batch, head, query, segment]; labels [batch or 1, key]."""
    membership = labels[..., None] == torch.arange(n_segments, device=labels.device)
    return pattern @ membership.to(pattern.dtype)[:, None]


def _top_key(pattern: Tensor) -> Tensor:
    """Return the column of each row's largest weight and how many columns share it, [batch, head, query, 2]."""
    top = pattern.amax(-1, keepdim=True)
    is_top = pattern >= top * (1 - attention.TIE)
    pairs = torch.stack([is_top.int().argmax(-1), is_top.sum(-1)], -1).to(pattern.dtype)
    return pairs.masked_fill(~(top > 0), torch.nan)


def at_positions(top: Tensor, slots: KeySlots) -> Tensor:
    """Return top keys [batch, head, query, 2] with the absolute position of the key in place of its index."""
    return torch.stack([slots.positions_of(top[..., 0]), top[..., 1]], -1)
