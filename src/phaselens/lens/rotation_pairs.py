"""The pairs of dimensions that a model's rotation mixes, measured on the rotation itself.

The basis vectors of a head go through every layer as queries and keys, in one forward. All tokens of its first row have
position 0, those of each other row position 1 or one far position. Between two rows each vector changes by the same
linear map, the rotation from one position to the other. Its matrix [d_head, d_head] follows from the vectors, and its
entries off the diagonal are the dimensions that it mixes; those from position 0 to 1 are the cosines and sines of the
pairs' angles. Nothing here depends on the family: that forward skips the norms of queries and keys, and a factor on the
rotated dimensions (YaRN's, longrope's) is in every row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from phaselens.errors import RefusedModel
from phaselens.lens import drope, families
from phaselens.lens.components import StreamingAttention, attention_layers, probe
from phaselens.lens.info import RotatedPairs
from phaselens.lens.module_calls import pass_on
from phaselens.lens.null_rotation import cos_and_sin
from phaselens.lens.points import ROTATED_POINTS, Hook, HookFunction, in_layer

if TYPE_CHECKING:
    from phaselens.lens.bridge import HookedTransformer

FAR = (10**3 + 9, 10**5 + 3, 10**7 + 19)
"""Far positions, at which even the slowest pairs of a large base turn visibly."""
_COS_AND_SIN = ("hook_cos", "hook_sin")
_SAME_ANGLE = 1e-2
"""Largest relative difference between the angle of a pair and those of the entries that turn it."""
SMALLEST = 1e-9
"""Entries of a rotation matrix above this mix two dimensions; with basis vectors, all others stay exactly zero."""


def read_rotated_pairs(lens: HookedTransformer, encodings: Sequence[str]) -> tuple[RotatedPairs | None, ...]:
    """Return the pairs of dimensions that each layer's rotation mixes; None for a layer without rotation.

    Call it before any rotation is nulled. A DroPE checkpoint keeps the pairs of the family it was made from, so that a
    model and its copies without rotation are compared on the same pairs.

    Args:
        encodings: the result of `detect_rotation`.
    """
    has_rotation = [encoding in ("rope", "learned+rope") for encoding in encodings]
    dropped = _drope_rotation(lens)
    if dropped is not None:
        return (dropped,) * len(has_rotation)
    if not any(has_rotation):
        return (None,) * len(has_rotation)
    states, angles = _rotated(lens)
    attentions = attention_layers(lens)
    rotations: list[RotatedPairs | None] = []
    for layer, rotates in enumerate(has_rotation):
        if not rotates:
            rotations.append(None)
            continue
        rotation = _with_problem(pairs_of(states[layer], lens.dtype))
        entries = _entries(rotation.angles, angles.get(layer))
        factor = _attention_factor(attentions[layer])
        rotations.append(replace(rotation, factor=factor, entries=entries))
    return tuple(rotations)


def _entries(angles: Sequence[float], angles_of_entries: Tensor | None) -> tuple[tuple[int, ...], ...]:
    """Return the entries of cos and sin that turn each pair: those whose angle is nearest to the pair's.

    Where they are depends on the family: each angle once, or twice, in one half after the other or side by side.
    Empty if a pair has none of its angle.
    """
    if angles_of_entries is None:
        return ()
    entries = []
    for angle in angles:
        distances = (angles_of_entries - angle).abs()
        if float(distances.min()) > _SAME_ANGLE * angle:
            return ()
        entries.append(tuple(torch.nonzero(distances <= distances.min())[:, 0].tolist()))
    return tuple(entries)


def _attention_factor(attention: StreamingAttention) -> float | None:
    """Return the factor of cos and sin, which cos has at position 0; None if there is no such one number."""
    if attention.origin is None:
        return None
    cos, sin = cos_and_sin(attention.origin)
    factors = cos.unique().tolist()
    return float(factors[0]) if len(factors) == 1 and not bool(sin.any()) else None


def _with_problem(rotation: RotatedPairs) -> RotatedPairs:
    """Return `rotation`, with a problem if it has no pair although its layer rotates."""
    if rotation.pairs or rotation.problem:
        return rotation
    return RotatedPairs(
        (), rotation.d_head, "no dimension turns visibly at any position that the model is given"
    )


def pairs_of(rotated: Tensor, dtype: torch.dtype) -> RotatedPairs:
    """Return the pairs that mix, from the same vectors rotated to several positions.

    Args:
        rotated: [position, sample, d_head], float64, each sample the same vector at every position, of which the first
            two are 0 and 1. The samples are basis vectors, or any vectors that span a head.
        dtype: the dtype in which the rotation was computed; it bounds the rounding of vectors other than basis vectors.

    Returns:
        The pairs, or a `problem` where the matrices do not mix pairs.
    """
    d_head = rotated.shape[-1]
    if not bool(rotated.isfinite().all()):
        return RotatedPairs((), d_head, "queries or keys at far positions are not finite")
    unrotated, at_far_positions = rotated[0], rotated[1:]
    if len(unrotated) < d_head or int(torch.linalg.matrix_rank(unrotated)) < d_head:
        return RotatedPairs((), d_head, "queries and keys do not reach every dimension of a head")
    is_basis = bool(((unrotated != 0).sum(-1) <= 1).all())
    limit = SMALLEST if is_basis else min(0.15, 64 * d_head**0.5 * torch.finfo(dtype).eps)
    matrices = torch.linalg.lstsq(unrotated, at_far_positions.transpose(0, 1).flatten(1)).solution.unflatten(
        1, (-1, d_head)
    )
    turned = matrices.abs().amax(1).fill_diagonal_(0.0)
    mixes = torch.maximum(turned, turned.T) > limit
    if bool((mixes.sum(-1) > 1).any()):
        return RotatedPairs((), d_head, "the rotation mixes more than pairs of dimensions")
    pairs = [(low, high) for low, high in mixes.nonzero().tolist() if low < high]
    step = matrices[:, 0]
    angles = [math.atan2(float(step[low, high].abs()), float(step[low, low])) for low, high in pairs]
    return RotatedPairs(tuple(pairs), d_head, angles=tuple(angles))


def _far_positions(lens: HookedTransformer) -> tuple[int, ...]:
    """Return far positions that the model has: a rotation may be a table, certainly where cos and sin are not given."""
    n_ctx = families.n_ctx_of(lens.original_model)
    has_table = next(families.rotation_tables(lens.original_model), None) is not None
    may_be_table = any(attention.origin is None for attention in attention_layers(lens).values())
    if n_ctx is None or not (has_table or may_be_table):
        return FAR
    return tuple(min(position, n_ctx - 1 - index) for index, position in enumerate(FAR))


def _rotated(lens: HookedTransformer) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Rotate basis vectors in each layer, as queries and keys, to 0, 1 and far positions.

    Returns:
        By layer, [position, sample, d_head], float64; and the angles [entry] of cos and sin at position 1, for the
        layers that have them.
    """
    attentions = attention_layers(lens)
    all_facts = [attention.facts for attention in attentions.values()]
    n_tokens = max(math.ceil(1.25 * facts.d_head / (facts.n_heads + facts.n_kv_heads)) for facts in all_facts)
    ids = torch.tensor([0, 1, *_far_positions(lens)], device=lens.device)[:, None].repeat(1, n_tokens)
    generator = torch.Generator().manual_seed(0)
    rotated: dict[tuple[int, str], Tensor] = {}

    def put_basis(first_dimension: int, d_head: int) -> HookFunction:
        def put(value: Tensor, hook: object) -> Tensor:
            n_vectors = value[0].numel() // d_head
            vectors = torch.eye(d_head)[(first_dimension + torch.arange(n_vectors)) % d_head]
            return _to_all_rows(vectors.view(1, *value.shape[1:]), value)

        return put

    def put_random(value: Tensor, hook: object) -> Tensor:
        return _to_all_rows(torch.randn(value[:1].shape, generator=generator), value)

    def keep(layer: int, point: str) -> HookFunction:
        return lambda value, hook: rotated.__setitem__((layer, point), value)

    hooks: list[Hook] = []
    for layer, attention in attentions.items():
        facts = attention.facts
        if _splits_queries_and_keys(lens, layer, attention):
            hooks.append((in_layer(layer, "attn.hook_q"), put_basis(0, facts.d_head)))
            hooks.append((in_layer(layer, "attn.hook_k"), put_basis(facts.n_heads * n_tokens, facts.d_head)))
        else:
            hooks.append((in_layer(layer, "hook_in"), put_random))
        hooks += [(in_layer(layer, f"attn.{point}"), keep(layer, point)) for point in ROTATED_POINTS]
        names = [in_layer(layer, f"attn.{point}") for point in _COS_AND_SIN]
        if all(lens.find_hook(name) is not None for name in names):
            hooks += [(name, keep(layer, point)) for name, point in zip(names, _COS_AND_SIN, strict=True)]
    with _without_norms(list(attentions.values())):
        probe(lens, torch.zeros_like(ids), hooks, position_ids=ids)
    states = {
        layer: torch.cat([rotated[layer, point].flatten(1, 2) for point in ROTATED_POINTS], dim=1)
        .cpu()
        .double()
        for layer in attentions
    }
    angles = {}
    for layer in attentions:
        # One row per position, as the ids have; a module may also return one row for all.
        by_point = [rotated[layer, point] for point in _COS_AND_SIN if (layer, point) in rotated]
        if len(by_point) == 2 and all(tensor.dim() == 3 and len(tensor) == len(ids) for tensor in by_point):
            cos, sin = (tensor[1, 0].cpu().double() for tensor in by_point)
            angles[layer] = torch.atan2(sin.abs(), cos)
    return states, angles


def _to_all_rows(values: Tensor, like: Tensor) -> Tensor:
    """Return a new tensor with `values` [1, …] in each row; new because a model may write into it (OLMo's clip_qkv
    does)."""
    return values.to(like.device, like.dtype).expand_as(like).clone()


def _splits_queries_and_keys(lens: HookedTransformer, layer: int, attention: StreamingAttention) -> bool:
    """Return whether hook_q and hook_k can be edited: they cannot if one projection of unknown layout gives both."""
    if any(lens.find_hook(in_layer(layer, f"attn.{point}")) is None for point in ("hook_q", "hook_k")):
        return False
    if "qkv" not in attention.submodules:
        return True
    try:
        families.fused_layout(attention.original_component)
    except RefusedModel:
        return False
    return True


def _drope_rotation(lens: HookedTransformer) -> RotatedPairs | None:
    """Return the pairs of a DroPE model's base family; None for other models."""
    d_rotary = next(
        (
            module.d_rotary
            for module in lens.original_model.modules()
            if isinstance(module, drope.NoRotaryEmbedding)
        ),
        None,
    )
    if d_rotary is None:
        return None
    distinct_angles = torch.arange(1, d_rotary // 2 + 1, dtype=torch.float64) / d_rotary
    vectors = torch.eye(d_rotary, dtype=torch.float64)
    rotation = pairs_of(torch.stack([vectors, drope.rotate(vectors, distinct_angles)]), torch.float64)
    return replace(rotation, angles=drope.base_angles(lens.original_model.config, d_rotary), factor=1.0)


@contextmanager
def _without_norms(attentions: Sequence[StreamingAttention]) -> Iterator[None]:
    """Skip the norms inside attention, which act on queries and keys before the rotation."""
    norms = [norm for attention in attentions for norm in families.norms_in(attention.original_component)]
    handles = [module.register_forward_hook(pass_on) for module in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
