"""What can be hooked: names, shapes, dtypes and meanings, as `phaselens hooks` prints them.

Imports no torch, so that packages that are imported without it can read the declarations.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

from phaselens.errors import InputError, is_list_like, short_form


@dataclass(frozen=True)
class HookPointInfo:
    """One hook point, or the same one of a run of layers: `blocks.{0..7}.attn.hook_sink`."""

    name: str
    shape: str
    dtype: str
    meaning: str


# By the end of the name. Shapes are as a hook function receives the tensor.
_MEANINGS: dict[str, tuple[str, str]] = {
    "hook_embed": ("[batch, pos, d_model]", "token embedding"),
    "hook_pos_embed": ("[1, pos, d_model]", "learned position embedding"),
    "hook_resid_pre": ("[batch, pos, d_model]", "residual stream entering the layer"),
    "hook_resid_mid": (
        "[batch, pos, d_model]",
        "residual stream between attention and MLP; edits reach the skip path",
    ),
    "hook_resid_post": ("[batch, pos, d_model]", "residual stream leaving the layer"),
    "hook_attn_out": ("[batch, pos, d_model]", "what attention adds to the residual stream"),
    "hook_mlp_out": ("[batch, pos, d_model]", "what the MLP adds to the residual stream"),
    "attn.hook_q": ("[batch, pos, head, d_head]", "queries, before norms and rotation"),
    "attn.hook_k": ("[batch, pos, kv_head, d_head]", "keys, before norms and rotation"),
    "attn.hook_v": ("[batch, pos, kv_head, d_head]", "values"),
    "attn.hook_rot_q": (
        "[batch, pos, head, d_head]",
        "queries as they meet the keys: after norms and rotation",
    ),
    "attn.hook_rot_k": (
        "[batch, pos, kv_head, d_head]",
        "keys as they meet the queries: after norms and rotation",
    ),
    "attn.hook_cos": ("[1, pos, d_rotary]", "cosines of the rotation"),
    "attn.hook_sin": ("[1, pos, d_rotary]", "sines of the rotation"),
    "attn.hook_lse": ("[batch, head, query]", "log-sum-exp of the row's scores, nats; read only"),
    "attn.hook_sink": (
        "[batch, head, query]",
        "fraction of the row's attention on key 0, or the key asked for; read only",
    ),
    "attn.hook_entropy": ("[batch, head, query]", "entropy of the row's attention, nats; read only"),
    "attn.hook_received": (
        "[batch, head, key]",
        "attention that a key receives, summed over queries; read only",
    ),
    "attn.hook_distance": (
        "[batch, head, distance]",
        "attention given to the key so many positions back, summed over queries; 64 distances, or the number asked "
        "for; read only",
    ),
    "attn.hook_attn_scores": (
        "[batch, head, query, key]",
        "scores before the softmax; builds the matrix in this layer",
    ),
    "attn.hook_pattern": (
        "[batch, head, query, key]",
        "attention after the softmax; builds the matrix in this layer",
    ),
    "attn.hook_attended": (
        "[batch, pos, head, d_head]",
        "what each head reads: its attention times the values, before any norm or gate that follows",
    ),
    "attn.hook_z": (
        "[batch, pos, head, d_head]",
        "what the output projection takes of each head, after such a norm or gate",
    ),
    "hook_normalized": (
        "[batch, pos, d_model]",
        "activations divided by their norm, before the norm's weights",
    ),
    "hook_scale": ("[batch, pos, 1]", "what the norm divides by"),
}
ALIASES = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "attn.hook_q",
            "attn.hook_k", "attn.hook_v", "attn.hook_z")  # fmt: skip


def describe_hooks(lens: Any, *, every: bool = False) -> list[HookPointInfo]:
    """The hook points of a lens, the same one of several layers as one row, in the order they fire.

    Args:
        every: also the inner points of TransformerLens' components (`hook_in`, `hook_out`, …), with measured shapes.

    Returns:
        Only points that fire in a plain forward of this model; found by running one.
    """
    names = list(lens.hook_dict)
    for layer in range(lens.info.n_layers):
        names += [f"blocks.{layer}.{alias}" for alias in ALIASES]
    listed = dict.fromkeys(name for name in names if every or _known(name) is not None)
    seen = _fire_all(lens, list(listed))
    grouped: dict[tuple[str, str, str, str], list[int]] = {}
    for name in seen:
        value = seen[name]
        known = _known(name)
        shape, meaning = known if known is not None else (str(list(value.shape)), "")
        in_layer = re.match(r"blocks\.(\d+)\.", name)
        pattern = re.sub(r"^blocks\.\d+\.", "blocks.{}.", name)
        dtype = str(value.dtype).removeprefix("torch.")
        grouped.setdefault((pattern, shape, dtype, meaning), []).append(int(in_layer[1]) if in_layer else -1)
    return [
        HookPointInfo(pattern.replace("{}", _runs(layers)), shape, dtype, meaning)
        for (pattern, shape, dtype, meaning), layers in grouped.items()
    ]


def _known(name: str) -> tuple[str, str] | None:
    """What is said of the point of that name; the inner points of norms and MLPs are not in the short list."""
    inside = re.sub(r"^blocks\.\d+\.", "", name)
    if inside.startswith(("ln_final.", "ln1.", "ln2.")):
        return _MEANINGS.get(inside.split(".", 1)[1]) if inside.count(".") == 1 else None
    return _MEANINGS.get(inside)


@cache
def dimensions(name: str) -> tuple[str, ...]:
    """What the dimensions of the tensor at a hook point are declared to run over; empty outside of the short list.

    >>> dimensions("blocks.0.attn.hook_rot_k"), dimensions("blocks.0.mlp.hook_in")
    (('batch', 'pos', 'kv_head', 'd_head'), ())
    """
    declared = _known(name)
    return () if declared is None else tuple(declared[0].strip("[]").split(", "))


def heads_at(name: str) -> str | None:
    """Which heads the tensor at a hook point has: `head` (of queries), `kv_head` (of keys and values), or None.

    >>> heads_at("blocks.0.attn.hook_pattern"), heads_at("blocks.0.attn.hook_v"), heads_at("blocks.0.hook_mlp_out")
    ('head', 'kv_head', None)
    """
    return next((what for what in dimensions(name) if what in ("head", "kv_head")), None)


_IN_HEAD_NORM = re.compile(r"\.attn\.\w*norm\w*\.")


def position_axis(lens: Any, name: str) -> int | None:
    """Which dimension of the tensor at a hook point runs over positions (of queries, for a matrix); None if none does.

    Declared for the points in the short list. Inside the norms of queries and keys it is measured, since families norm
    before or after they move the heads in front of the positions. All other points are [batch, pos, …].
    """
    declared = dimensions(name)
    if declared:
        return next((axis for axis, what in enumerate(declared) if what in ("pos", "query")), None)
    if not _IN_HEAD_NORM.search(name):
        return 1
    if name not in lens.position_axes:
        shapes = []
        for n_tokens in (5, 6):
            fired = _fire_all(lens, [name], n_tokens)
            shapes.append(tuple(fired[name].shape) if name in fired else ())
        grows = [axis for axis, sizes in enumerate(zip(*shapes, strict=False)) if sizes == (5, 6)]
        lens.position_axes[name] = grows[0] if grows and grows[0] > 0 else None
    axis: int | None = lens.position_axes[name]
    return axis


def _fire_all(lens: Any, names: list[str], n_tokens: int = 5) -> dict[str, Tensor]:
    """Each named point's activation in one forward of a few tokens, in the order they fired."""
    import torch

    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda value, hook: seen.__setitem__(name, value) if isinstance(value, torch.Tensor) else None

    tokens = torch.zeros((1, min(n_tokens, lens.info.n_ctx or n_tokens)), dtype=torch.long)
    hooks = [(name, keep(name)) for name in names if lens.find_hook(name) is not None]
    lens.stream(tokens, hooks, unembed=True)
    return seen


def _runs(layers: list[int]) -> str:
    """Layer numbers as runs: `3`, `{0..7}`, `{0,2,4}`."""
    layers = sorted(layers)
    if len(layers) == 1:
        return str(layers[0])
    if layers == list(range(layers[0], layers[-1] + 1)):
        return f"{{{layers[0]}..{layers[-1]}}}"
    return "{" + ",".join(map(str, layers)) + "}"


def hooked_points(lens: Any, hooks: Any) -> list[tuple[Any, Callable[..., Any]]]:
    """Pairs of a hook point and a function, from pairs of its name and the function.

    Raises:
        InputError: for anything else, and for a hook point that the model does not have.
    """
    if not is_list_like(hooks):
        raise InputError(f"expected hooks as a list of pairs (name, function), received {short_form(hooks)}")
    points = []
    for pair in hooks:
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not isinstance(pair[0], str):
            raise InputError(
                f"expected each of hooks as a pair (name, function), received {short_form(pair)}"
            )
        name, hook = pair
        point = lens.require_hook(name)
        if not callable(hook):
            raise InputError(f"expected a function for the hook point {name}, received {short_form(hook)}")
        points.append((point, hook))
    return points
