"""Where edits go: names for kinds of activations, and the layers, positions and heads of one of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phaselens.errors import InputError, close_matches

if TYPE_CHECKING:
    from torch import Tensor

    from phaselens.lens import HookedTransformer

#: What can be swept, and the hook point in each layer that it is.
KINDS: dict[str, str] = {
    "resid": "hook_resid_pre",
    "attn": "hook_attn_out",
    "mlp": "hook_mlp_out",
    "head": "attn.hook_z",
    "q": "attn.hook_q",
    "k": "attn.hook_k",
    "v": "attn.hook_v",
    "pattern": "attn.hook_pattern",
}
_MEASURED = ("hook_lse", "hook_sink", "hook_entropy", "hook_received", "hook_distance")
_WITH_HEADS = ("hook_q", "hook_k", "hook_v", "hook_z", "hook_rot_q", "hook_rot_k", "hook_attended")
_MATRIX = ("hook_pattern", "hook_attn_scores")
_KV = ("hook_k", "hook_v", "hook_rot_k")
_IN_LAYER = re.compile(r"blocks\.(\d+)\.(.+)")

Places = int | Iterable[int] | str | None


def kind_point(what: str) -> str:
    """The hook point that a kind of activation is, within its layer.

    Raises:
        InputError: with close matches, for a kind that does not exist.
    """
    if what not in KINDS:
        raise InputError(f"what={what!r}; {close_matches(str(what), KINDS)}")
    return KINDS[what]


def layer_of(name: str) -> int | None:
    """The layer a hook name is in, or None."""
    inside = _IN_LAYER.fullmatch(name)
    return int(inside[1]) if inside else None


def is_matrix(name: str) -> bool:
    """Whether the point's tensor is [batch, head, query, key]."""
    return name.endswith(_MATRIX)


def n_heads_of(lens: HookedTransformer, name: str) -> int | None:
    """How many heads the tensor at this point has, or None where it has no axis of heads."""
    tail = name.rsplit(".", 1)[-1]
    if tail in _KV:
        return lens.info.n_kv_heads
    return lens.info.n_heads if tail in (*_WITH_HEADS, *_MATRIX) else None


def chosen(given: Places, n: int, noun: str, of: str) -> tuple[int, ...]:
    """Layers, positions or heads as numbers from 0: `"all"` or None is every one; negative numbers count from the end.

    Raises:
        InputError: for what is none of `n`.
    """
    if given is None or (isinstance(given, str) and given == "all"):
        return tuple(range(n))
    if isinstance(given, str):
        raise InputError(f"{noun}={given!r}: give a number, several, or 'all'")
    listed = [given] if isinstance(given, int) else list(given) if isinstance(given, Iterable) else [given]
    found = []
    for place in listed:
        if isinstance(place, bool) or not isinstance(place, int):
            raise InputError(f"{noun}={place!r}: give whole numbers, or 'all'")
        if not -n <= place < n:
            raise InputError(f"{noun} {place}: {of} has {n}, 0 to {n - 1}")
        found.append(place % n)
    if not found:
        raise InputError(f"{noun}: none is named; give a number, several, or 'all'")
    return tuple(dict.fromkeys(found))


@dataclass(frozen=True)
class Target:
    """The places an edit covers: hook names, positions and heads (None: all)."""

    names: tuple[str, ...]
    positions: tuple[int, ...] | None
    heads: tuple[int, ...] | None = None

    def write(self, name: str, old: Tensor, new: Tensor | float) -> Tensor:
        """A copy of `old` with `new` (a number, or a tensor of its shape, batch 1) at the target's places."""
        import torch

        edited = old.clone()
        every = slice(None)
        rows = every if self.positions is None else torch.tensor(self.positions, device=old.device)
        heads = every if self.heads is None else torch.tensor(self.heads, device=old.device)
        if isinstance(rows, torch.Tensor) and isinstance(heads, torch.Tensor):
            # All pairs of the two, in the order of the tensor's own axes.
            rows, heads = (rows, heads[:, None]) if is_matrix(name) else (rows[:, None], heads)
        pick: tuple[Any, ...] = (every, heads, rows) if is_matrix(name) else (every, rows)
        if self.heads is not None and not is_matrix(name):
            pick = (every, rows, heads)
        edited[pick] = new[pick] if isinstance(new, torch.Tensor) else new
        return edited


def target(
    lens: HookedTransformer,
    n_tokens: int,
    point: str | None,
    what: str | None,
    layer: Places,
    pos: Places,
    head: Places,
) -> Target:
    """The places that a caller described, either by a whole hook name or by kind and layers.

    Raises:
        InputError: for a name, layer, position or head that does not exist, or contradicts another.
    """
    label = lens.info.label
    if point is None and what is None:
        raise InputError(
            "name a hook point ('blocks.3.hook_resid_post') or a kind of activation (what='resid')"
        )
    if point is not None and what is not None:
        raise InputError(f"{point!r} and what={what!r} both say where; name one of them")
    if point is not None:
        if layer is not None:
            raise InputError(
                f"{point!r} names its layer; leave layer= out, or write what= instead of the name"
            )
        if not isinstance(point, str):
            raise InputError(f"a hook point is a text, got {type(point).__name__}")
        names: Sequence[str] = (point,)
    else:
        inside = kind_point(str(what))
        names = [f"blocks.{each}.{inside}" for each in chosen(layer, lens.info.n_layers, "layer", label)]
    for name in names:
        lens.require_hook(name)
        if name.endswith(_MEASURED):
            raise InputError(
                f"{name} is a measurement, and nothing in the model follows from it; edit hook_pattern"
            )
    places = chosen(pos, n_tokens, "pos", "the prompt")
    positions = None if pos is None or (isinstance(pos, str) and pos == "all") else places
    heads: tuple[int, ...] | None = None
    if head is not None and head != "all":
        n_heads = n_heads_of(lens, names[0])
        if n_heads is None:
            raise InputError(f"{names[0]} has no heads; leave head= out, or choose what='head'")
        heads = chosen(head, n_heads, "head", names[0])
    return Target(tuple(names), positions, heads)
