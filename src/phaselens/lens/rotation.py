"""Which dimensions of a head the model's rotation mixes, read from the rotation itself.

The basis vectors of a head go through every layer as queries and keys, in one forward: in its first row all tokens
stand at position 0, in each other row at one far position. Between two rows each vector changes by the same linear map,
the rotation from one position to the other, so that its matrix [d_head, d_head] can be read, and the dimensions that it
mixes are those off its diagonal. Nothing here depends on the family: norms of queries and keys are left out of that
forward, and a factor on the rotated dimensions (YaRN's, longrope's) is in every row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from phaselens.errors import RefusedModel
from phaselens.lens import drope, families
from phaselens.lens.components import each_attention, probe
from phaselens.lens.info import Rotation

FAR = (10**3 + 9, 10**5 + 3, 10**7 + 19)
"""Far positions, at which also the slowest pairs of a large base turn visibly."""
SMALLEST = 1e-9
"""Entries of a rotation matrix above this mix two dimensions: of basis vectors, all others stay exactly zero."""
_ROTATED = ("hook_rot_q", "hook_rot_k")


def read_rotations(lens: Any, positions: Sequence[str]) -> tuple[Rotation | None, ...]:
    """The pairs of dimensions that each layer's rotation mixes, or None for a layer that has no rotation.

    A rotation that was nulled (positions=nope) is read as the model has it; a DroPE checkpoint keeps the pairs of the
    family it was made from, so that a model and its copies without rotation are compared on the same pairs.

    Args:
        positions: what `detect` says of each layer.
    """
    attentions = each_attention(lens)
    nulled = [attention.nulled for attention in attentions]
    rotary = [
        was_nulled or kind in ("rope", "learned+rope")
        for was_nulled, kind in zip(nulled, positions, strict=True)
    ]
    dropped = _drope_rotation(lens)
    if dropped is not None:
        return (dropped,) * len(attentions)
    if not any(rotary):
        return (None,) * len(attentions)
    try:
        for attention in attentions:
            attention.nulled = False
        rotated = _rotated(lens)
    finally:
        for attention, was_nulled in zip(attentions, nulled, strict=True):
            attention.nulled = was_nulled
    return tuple(
        _as_served(pairs_of(states, lens.dtype), kind) if rotates else None
        for states, rotates, kind in zip(rotated, rotary, positions, strict=True)
    )


def _as_served(rotation: Rotation, kind: str) -> Rotation | None:
    """None where a layer that was nulled has no rotation anyway; a problem where one that rotates shows no pair."""
    if rotation.pairs or rotation.problem:
        return rotation
    if kind == "nope":
        return None
    return Rotation((), rotation.d_head, "no dimension turns visibly at any far position")


def pairs_of(rotated: Tensor, dtype: torch.dtype) -> Rotation:
    """The pairs that mix, from the same vectors rotated to several positions.

    Args:
        rotated: [position, sample, d_head], float64, each sample the same vector at every position; basis vectors, or
            any that span a head.
        dtype: what the rotation was computed in, and so how far rounding blurs vectors that are no basis vectors.

    Returns:
        A `Rotation` that says in `problem` why there are no pairs, where the matrices are not those of pairs.
    """
    d_head = rotated.shape[-1]
    if not bool(rotated.isfinite().all()):
        return Rotation((), d_head, "queries or keys at far positions are not finite")
    first, others = rotated[0], rotated[1:]
    if len(first) < d_head or int(torch.linalg.matrix_rank(first)) < d_head:
        return Rotation((), d_head, "queries and keys do not reach every dimension of a head")
    is_basis = bool(((first != 0).sum(-1) <= 1).all())
    limit = SMALLEST if is_basis else min(0.15, 64 * d_head**0.5 * torch.finfo(dtype).eps)
    matrices = torch.linalg.lstsq(first, others.transpose(0, 1).flatten(1)).solution.unflatten(
        1, (-1, d_head)
    )
    turned = matrices.abs().amax(1).fill_diagonal_(0.0)
    mixes = torch.maximum(turned, turned.T) > limit
    if bool((mixes.sum(-1) > 1).any()):
        return Rotation((), d_head, "the rotation mixes more than pairs of dimensions")
    pairs = [(low, high) for low, high in mixes.nonzero().tolist() if low < high]
    return Rotation(tuple(pairs), d_head)


def _rotated(lens: Any) -> list[Tensor]:
    """By layer: basis vectors as queries and keys, [position, sample, d_head] in float64, rotated to 0 and to `FAR`."""
    attentions = each_attention(lens)
    config = lens.original_model.config
    module = attentions[0].original_component
    d_head, n_heads = families.d_head_of(module, config), int(config.num_attention_heads)
    n_tokens = math.ceil(1.25 * d_head / (n_heads + families.n_kv_heads_of(module, config)))
    ids = torch.tensor([0, *FAR], device=lens.device)[:, None].repeat(1, n_tokens)
    generator = torch.Generator().manual_seed(0)
    rotated: dict[tuple[int, str], Tensor] = {}

    def put_basis(first: int) -> Any:
        def put(value: Tensor, hook: Any) -> Tensor:
            n_vectors = value[0].numel() // d_head
            vectors = torch.eye(d_head)[(first + torch.arange(n_vectors)) % d_head]
            return _to_all_rows(vectors.view(1, *value.shape[1:]), value)

        return put

    def put_random(value: Tensor, hook: Any) -> Tensor:
        return _to_all_rows(torch.randn(value[:1].shape, generator=generator), value)

    def keep(layer: int, point: str) -> Any:
        return lambda value, hook: rotated.__setitem__((layer, point), value)

    hooks = []
    for layer, attention in enumerate(attentions):
        if _splits_queries_and_keys(attention):
            hooks.append((f"blocks.{layer}.attn.hook_q", put_basis(0)))
            hooks.append((f"blocks.{layer}.attn.hook_k", put_basis(n_heads * n_tokens)))
        else:
            hooks.append((f"blocks.{layer}.hook_in", put_random))
        hooks += [(f"blocks.{layer}.attn.{point}", keep(layer, point)) for point in _ROTATED]
    with _without_norms(attentions):
        probe(lens, torch.zeros_like(ids), hooks, position_ids=ids)
    return [
        torch.cat([rotated[layer, point].flatten(1, 2) for point in _ROTATED], dim=1).cpu().double()
        for layer in range(len(attentions))
    ]


def _to_all_rows(values: Tensor, like: Tensor) -> Tensor:
    """values [1, …] in each row of a tensor of its own, since a model may write into it (OLMo's clip_qkv does)."""
    return values.to(like.device, like.dtype).expand_as(like).clone()


def _splits_queries_and_keys(attention: Any) -> bool:
    """Whether hook_q and hook_k can be edited: not where one projection of unknown layout gives both."""
    if "qkv" not in attention.submodules:
        return True
    try:
        families.fused_layout(attention.original_component)
    except RefusedModel:
        return False
    return True


def _drope_rotation(lens: Any) -> Rotation | None:
    """What the rotation of a DroPE model's base family mixes; None for other models."""
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
    angles = torch.arange(1, d_rotary // 2 + 1, dtype=torch.float64) / d_rotary
    vectors = torch.eye(d_rotary, dtype=torch.float64)
    return pairs_of(torch.stack([vectors, drope.rotate(vectors, angles)]), torch.float64)


@contextmanager
def _without_norms(attentions: Sequence[Any]) -> Iterator[None]:
    """Let norms inside attention, which act on queries and keys before the rotation, hand on what they are given."""
    norms = [
        module
        for attention in attentions
        for name, module in attention.original_component.named_modules()
        # The parametrizations of a weight (weight_norm) act on no query and no key.
        if "norm" in type(module).__name__.lower() and "parametrizations" not in name.split(".")
    ]
    handles = [module.register_forward_hook(lambda _module, inputs, _out: inputs[0]) for module in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
