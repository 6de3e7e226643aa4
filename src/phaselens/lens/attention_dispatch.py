"""The attention function that transformers calls instead of its own in every model that the lens wraps.

It fires the hook points inside attention and picks, layer by layer, the cheapest computation that serves them:

* no statistic and no matrix is hooked: transformers' own SDPA, bit for bit what the model computes without the lens
  (or, for softcapped scores and learned sink logits, which SDPA lacks, the exact streaming computation);
* a statistic (`points.STATISTICS`) is hooked: the fused kernel with its log-sum-exp, O(L) memory;
* ``hook_attn_scores`` or ``hook_pattern`` is hooked: the explicit matrix, in that layer only.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from phaselens import attention
from phaselens.errors import InputError, RefusedModel
from phaselens.lens import interface_options
from phaselens.lens.attention_owner import AttentionOwner, is_hooked
from phaselens.lens.interface_calls import InterfaceCall, is_recording, note_call
from phaselens.lens.key_edits import computed_once, fire_key_scores
from phaselens.lens.lazy_masks import LazyMask
from phaselens.lens.masks import build_mask, note_mask, selected_keys, without_bias
from phaselens.lens.matrix import (
    at_positions,
    fire_matrix,
    from_matrix,
    largest_products,
    learned_sink_mass,
    weigh,
    without_sink_logits,
)
from phaselens.lens.slots import KernelOptions, KeySlots

IMPLEMENTATION = "phaselens"
"""The name under which transformers knows the lens' attention."""

# The attribute of an attention module that refers to the bridge component that is calling it. A weak reference,
# since a plain one would make a cycle that keeps model and bridge alive.
_OWNER = "_phaselens_owner"


def attend_hooked(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | LazyMask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    bias: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, Tensor | None]:
    """Attend, firing the hook points of the bridge component that is calling `module`.

    Args:
        query: [batch, n_heads, n_queries, d_head], after rotation and norms.
        key, value: [batch, n_kv_heads, n_keys, d_head].
        attention_mask: None for causal attention; else bool, True where visible, or additive.
        bias: [batch | 1, head | 1, 1 | query, key], added to the scores; `position_bias` is transformers' name for it.
        kwargs: `indices` [batch, n_queries, choice] are the keys that an indexer selects for each query (sparse
            attention); other keys are hidden.

    Returns:
        The output [batch, n_queries, n_heads, d_head] and, where it was built, the pattern.
    """
    if isinstance(attention_mask, LazyMask):
        attention_mask = attention_mask.visible
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    if is_causal is False or getattr(module, "is_causal", True) is False:
        raise RefusedModel(
            f"{type(module).__name__} attends in both directions; PhaseLens serves causal attention only"
        )
    interface_options.require_served(module, kwargs)
    bias = bias if position_bias is None else position_bias
    note_mask(module, attention_mask)
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask, added = without_bias(attention_mask)
        bias = added if bias is None or added is None else bias + added
    options: KernelOptions = {
        "scale": scaling,
        "mask": attention_mask,
        "softcap": softcap,
        "sink_logits": s_aux,
        "bias": bias,
    }
    reference = module.__dict__.get(_OWNER)
    owner: AttentionOwner | None = reference() if reference is not None else None
    indices = kwargs.pop("indices", None)
    if isinstance(indices, Tensor):
        options["mask"] = selected_keys(attention_mask, indices, key.shape[2])
    attend_as_model = functools.partial(_attend_as_model, module, dropout, is_causal, kwargs)
    if owner is None:
        if attention_mask is None and query.shape[2] > 1:
            # transformers omits the mask if the first query is at the first key; a static cache then has room for
            # later keys.
            n_filled = query.shape[2]
            key, value = key[:, :, :n_filled], value[:, :, :n_filled]
            if options["bias"] is not None:
                options["bias"] = options["bias"][..., :n_filled]
        output = attend_as_model(query, key, value, options)
        if is_recording():
            call = InterfaceCall(module, query, key, value, scaling, softcap, s_aux, output)
            note_call(replace(call, selects=indices is not None))
        return output, None

    slots = KeySlots.of_call(owner.streaming_options.rows, key)
    if attention_mask is None and 1 < query.shape[2] < slots.n_kept:
        raise RefusedModel(
            f"{type(module).__name__} passed {query.shape[2]} queries and {key.shape[2]} keys without a mask; "
            "the position of the first query among the keys is unknown"
        )
    owner.score_bias = options["bias"]
    query, key = owner.fire_rotated(query, key)
    output, pattern = _attend_owned(owner, slots, attend_as_model, query, key, value, options)
    return owner.hook_attended(output), pattern


def _attend_owned(
    owner: AttentionOwner,
    slots: KeySlots,
    attend_as_model: Callable[[Tensor, Tensor, Tensor, KernelOptions], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: KernelOptions,
) -> tuple[Tensor, Tensor | None]:
    """Attend by the cheapest computation that serves the hooks on the owner's statistics, scores and matrix."""
    explicit = is_hooked(owner.hook_attn_scores) or is_hooked(owner.hook_pattern)
    statistics = owner.hooked_statistics()
    reads_scores = explicit or is_hooked(owner.hook_key_scores)
    if not reads_scores and not statistics and _is_native(options):
        return computed_once(
            owner.kernels, "output", lambda: attend_as_model(query, key, value, options)
        ), None
    key, value, options = slots.crop(key), slots.crop(value), slots.crop_mask(options)
    needs_gradient = _needs_gradient(query, key, value)
    key_edit = fire_key_scores(owner, slots, query, key, options, needs_gradient)
    # Statistics follow the edit only if they are read from the matrix; a gradient needs it, too.
    if key_edit is not None and (statistics or needs_gradient):
        explicit = True
    pattern = None
    if explicit:
        scores, pattern, edited = fire_matrix(owner, slots, query, key, options, key_edit)
        if edited or not owner.streaming_options.reads_only or needs_gradient:
            largest = functools.partial(largest_products, query, key, options)
            return from_matrix(owner, slots, scores, pattern, value, options, largest)
    if not statistics:
        if key_edit is not None:
            return key_edit.output(owner, attend_as_model, query, key, value, options), pattern
        output = computed_once(owner.kernels, "output", lambda: attend_as_model(query, key, value, options))
        return output, pattern
    if needs_gradient:
        # The fused kernel's log-sum-exp carries no gradient. The output keeps its own; the statistics are constants,
        # on which a backward pass fails loudly instead of being wrong.
        output = attend_as_model(query, key, value, options)
        with torch.no_grad():
            query, key, value = query.detach(), key.detach(), value.detach()
            _, lse = attention.attend(query, key, value, **options)
            _fire_statistics(owner, slots, statistics, query, key, lse, options)
        return output, None
    with torch.no_grad():
        output, lse = attention.attend(query, key, value, **options)
        _fire_statistics(owner, slots, statistics, query, key, lse, options)
    return output.transpose(1, 2).contiguous(), pattern


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _attend_as_model(
    module: nn.Module,
    dropout: float,
    is_causal: bool | None,
    kwargs: dict[str, object],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: KernelOptions,
) -> Tensor:
    """Compute attention as the model itself does, [batch, query, head, d_head]."""
    if _is_native(options):
        output, _ = sdpa_attention_forward(
            module, query, key, value, options["mask"], dropout=dropout, scaling=options["scale"],
            is_causal=is_causal, **kwargs,
        )  # fmt: skip
        return output
    if dropout:
        raise InputError(
            f"{type(module).__name__}: attention dropout is not supported with a softcap, sink logits or a bias; "
            "call model.eval()"
        )
    if _needs_gradient(query, key, value):
        scores = attention.explicit_scores(query, key, **without_sink_logits(options))
        pattern = attention.explicit_pattern(scores, sink_logits=options["sink_logits"])
        return weigh(pattern, value).transpose(1, 2).contiguous()
    output, _ = attention.attend(query, key, value, **options)
    return output.transpose(1, 2).contiguous()


def _is_native(options: KernelOptions) -> bool:
    """Return whether SDPA has all of these options."""
    return all(options[name] is None for name in ("softcap", "sink_logits", "bias"))


def _fire_statistics(
    owner: AttentionOwner,
    slots: KeySlots,
    statistics: list[str],
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    options: KernelOptions,
) -> None:
    streaming = owner.streaming_options
    slots.require_served(statistics)
    sink_indices = [slot - slots.n_dropped for slot in slots.slots_at(streaming.sink_position)]
    shared = len(sink_indices) == 1 and 0 <= sink_indices[0] < key.shape[2]
    summary = attention.summarise(
        query,
        key,
        lse,
        position=sink_indices[0] if "hook_sink" in statistics and shared else None,
        itself="hook_itself" in statistics,
        entropy="hook_entropy" in statistics,
        received="hook_received" in statistics,
        distances=streaming.n_distances if "hook_distance" in statistics else None,
        segments=slots.segment_labels(key.device) if "hook_segments" in statistics else None,
        n_segments=slots.n_segments,
        top="hook_top_key" in statistics,
        largest="hook_largest_product" in statistics,
        refine="hook_lse" in statistics or "hook_learned_sink" in statistics,
        real=None if slots.real is None else slots.real.to(key.device),
        **options,
    )
    sink = summary.sink
    if "hook_sink" in statistics and not shared:
        sink = _sink_by_text(query, key, lse, sink_indices, options)
    received = summary.received
    values = {
        "hook_lse": summary.lse,
        "hook_sink": sink,
        "hook_learned_sink": None if summary.lse is None else learned_sink_mass(summary.lse, options),
        "hook_itself": summary.itself,
        "hook_entropy": summary.entropy,
        "hook_received": None if received is None else slots.with_dropped(received, 0.0),
        "hook_distance": summary.distance,
        "hook_segments": summary.segments,
        "hook_top_key": None if summary.top is None else at_positions(summary.top, slots),
        "hook_largest_product": summary.largest,
    }
    for name, value in values.items():
        if name in statistics and value is not None:
            owner.fire_statistic(name, value)


def _sink_by_text(
    query: Tensor, key: Tensor, lse: Tensor, sink_indices: list[int], options: KernelOptions
) -> Tensor:
    """Return the mass on each text's own sink key, [batch, head, query]; 0 where the text has no such key, or where a
    sliding cache has dropped it, which puts it outside of the window."""
    sink = torch.zeros_like(lse)
    indices = sink_indices if len(sink_indices) > 1 else sink_indices * len(lse)
    mask, bias = options["mask"], options["bias"]
    for index in sorted(set(indices)):
        if not 0 <= index < key.shape[2]:
            continue
        rows = torch.tensor([row for row, i in enumerate(indices) if i == index], device=lse.device)
        row_options: KernelOptions = {
            **options,
            "mask": mask if mask is None or len(mask) == 1 else mask[rows],
            "bias": bias if bias is None or len(bias) == 1 else bias[rows],
        }
        sink[rows] = attention.sink_mass(query[rows], key[rows], lse[rows], index, **row_options)
    return sink


@contextmanager
def owning(module: nn.Module, owner: AttentionOwner) -> Iterator[None]:
    """Make calls of `module` fire `owner`'s hook points inside the context, which may be entered again in a hook."""
    outer = module.__dict__.get(_OWNER)
    module.__dict__[_OWNER] = weakref.ref(owner)
    try:
        yield
    finally:
        if outer is None:
            del module.__dict__[_OWNER]
        else:
            module.__dict__[_OWNER] = outer


def disown(module: nn.Module) -> None:
    """Forget the owner of a call of `module` that was interrupted."""
    module.__dict__.pop(_OWNER, None)


AttentionInterface.register(IMPLEMENTATION, attend_hooked)
# Without this, transformers would silently drop padding masks, as for any attention that it does not know.
AttentionMaskInterface.register(IMPLEMENTATION, build_mask)
