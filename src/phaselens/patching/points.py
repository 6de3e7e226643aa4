"""Where edits go: names for kinds of activations, and the layers, positions and heads of one of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from phaselens.errors import InputError, close_matches, is_whole
from phaselens.lens.points import dimensions, heads_at

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
_IN_LAYER = re.compile(r"blocks\.(\d+)\.(.+)")

Places = int | Iterable[int] | str | None


def kind_point(what: str) -> str:
    """The hook point that a kind of activation is, within its layer.

    Raises:
        InputError: with close matches, for a kind that does not exist.
    """
    if not isinstance(what, str) or what not in KINDS:
        raise InputError(f"what={brief(what)}; {close_matches(str(what), KINDS)}")
    return KINDS[what]


def layer_of(name: str) -> int | None:
    """The layer a hook name is in, or None."""
    inside = _IN_LAYER.fullmatch(name)
    return int(inside[1]) if inside else None


def is_matrix(name: str) -> bool:
    """Whether the point's tensor is [batch, head, query, key]."""
    return dimensions(name)[-2:] == ("query", "key")


def row_axis(name: str) -> int:
    """Which dimension of the point's tensor has a row for each position: of queries, for a matrix."""
    return 2 if is_matrix(name) else 1


def n_heads_of(lens: HookedTransformer, name: str) -> int | None:
    """How many heads the tensor at this point has, or None where it has no axis of heads."""
    heads = heads_at(name)
    return {"head": lens.info.n_heads, "kv_head": lens.info.n_kv_heads}[heads] if heads else None


def brief(value: Any) -> str:
    """A value as one short piece of a message: numbers and texts as Python writes them, others by their type."""
    return repr(value) if value is None or isinstance(value, int | float | str) else type(value).__name__


def counted(number: int, noun: str) -> str:
    """A number and its noun: `1 token`, `6 tokens`."""
    return f"{number} {noun if number == 1 else noun + 's'}"


def numbers(given: Places, noun: str) -> tuple[int, ...] | None:
    """Layers, positions or heads as the caller wrote them, negative ones too; None for all (`"all"` or None).

    Raises:
        InputError: for anything but whole numbers.
    """
    if given is None or (isinstance(given, str) and given == "all"):
        return None
    if isinstance(given, str):
        raise InputError(f"{noun}={given!r}: give a number, several, or 'all'")
    listed: list[Any]
    try:
        listed = list(given) if isinstance(given, Iterable) else [given]
    except TypeError:  # an array without dimensions
        listed = [given]
    for number in listed:
        if not is_whole(number):
            raise InputError(f"{noun}={brief(number)}: give whole numbers, or 'all'")
    if not listed:
        raise InputError(f"{noun}: none is named; give a number, several, or 'all'")
    return tuple(dict.fromkeys(map(int, listed)))


def chosen(given: Places, n: int, noun: str, of: str) -> tuple[int, ...]:
    """Layers, positions or heads as numbers from 0: `"all"` or None is every one; negative numbers count from the end.

    Raises:
        InputError: for what is none of `n`.
    """
    listed = numbers(given, noun)
    if listed is None:
        return tuple(range(n))
    for number in listed:
        if not -n <= number < n:
            raise InputError(f"{noun} {number}: {of} has {n}, 0 to {n - 1}")
    return tuple(dict.fromkeys(number % n for number in listed))


def single(pos: Any, n: int) -> int:
    """One position of a prompt of `n` tokens, from 0; a negative one counts from the end.

    Raises:
        InputError: for none, for several, or for one that the prompt does not have.
    """
    if not is_whole(pos):
        raise InputError(f"pos={brief(pos)}: give one position, a whole number")
    return chosen(int(pos), n, "pos", "the prompt")[0]


@dataclass(frozen=True)
class Target:
    """The places an edit covers: hook names, positions and heads (None: all).

    `positions` count from 0 in the present prompts; `given` are the same as the caller wrote them, so that position
    −1 is the last one of other prompts too.
    """

    names: tuple[str, ...]
    positions: tuple[int, ...] | None
    heads: tuple[int, ...] | None = None
    given: tuple[int, ...] | None = None

    def fits(self, n_tokens: int) -> bool:
        """Whether prompts of `n_tokens` tokens have all of its positions."""
        return self.given is None or all(-n_tokens <= number < n_tokens for number in self.given)

    def on(self, n_tokens: int) -> Target:
        """The same places of prompts that they fit; elsewhere with its positions as they were given."""
        if self.given is None or not self.fits(n_tokens):
            return replace(self, positions=self.given)
        return replace(self, positions=chosen(self.given, n_tokens, "pos", "the prompt"))

    def write(self, name: str, old: Tensor, new: Tensor | float, start: int = 0, n_pads: int = 0) -> Tensor:
        """A copy of `old` with `new` at the target's places.

        Args:
            name: of the hook point.
            old: an activation whose first row stands at position `start`: behind a KV cache, that is not 0, and it is
                negative for a pad.
            new: a number, or a tensor of a whole prompt, [1, …], whose rows stand at positions 0, 1, …
            start: see `old`.
            n_pads: how many pads stand on the left of the text, as keys of a matrix.
        """
        import torch

        axis = row_axis(name)
        end = start + old.shape[axis]
        n_given = end if not isinstance(new, torch.Tensor) else new.shape[axis]
        positions = range(n_given) if self.positions is None else self.positions
        written = [position for position in positions if max(start, 0) <= position < min(end, n_given)]
        if not written:
            return old
        if isinstance(new, torch.Tensor) and is_matrix(name):
            new = _with_keys(name, new, old.shape[-1], n_pads)
        rows = torch.tensor(written, device=old.device)
        to, source = self._pick(name, rows - start), self._pick(name, rows)
        edited = old.clone()
        edited[to] = new[source] if isinstance(new, torch.Tensor) else new
        return edited

    def _pick(self, name: str, rows: Tensor) -> tuple[Any, ...]:
        """The index of some rows, and of the target's heads, in the tensor at a point."""
        import torch

        every = slice(None)
        if self.heads is None:
            return (every, every, rows) if is_matrix(name) else (every, rows)
        heads = torch.tensor(self.heads, device=rows.device)
        # All pairs of the two, in the order of the tensor's own axes.
        return (every, heads[:, None], rows) if is_matrix(name) else (every, rows[:, None], heads)


def _with_keys(name: str, matrix: Tensor, n_keys: int, n_pads: int) -> Tensor:
    """Scores or weights [1, head, query, key] for as many keys, the first of them pads: these, and those after the
    prompt, are hidden from its queries."""
    from torch.nn.functional import pad

    hidden = 0.0 if name.endswith("hook_pattern") else float("-inf")
    return pad(matrix, (n_pads, n_keys - n_pads - matrix.shape[-1]), value=hidden)


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
        if isinstance(point, str) and point in KINDS:
            raise InputError(f"{point!r} is a kind of activation, not a hook point; write what={point!r}")
        if layer is not None:
            raise InputError(
                f"{point!r} names its layer; leave layer= out, or write what= instead of the name"
            )
        if not isinstance(point, str):
            raise InputError(f"a hook point is a text, got {type(point).__name__}")
        names: Sequence[str] = (point,)
    else:
        assert what is not None
        inside = kind_point(what)
        names = [f"blocks.{each}.{inside}" for each in chosen(layer, lens.info.n_layers, "layer", label)]
    for name in names:
        lens.require_hook(name)
        if name.endswith(_MEASURED):
            raise InputError(
                f"{name} is a measurement, and nothing in the model follows from it; edit hook_pattern"
            )
        if lens.position_axis(name) != row_axis(name):
            raise InputError(
                f"{name} holds its heads before its positions in this family; edit attn.hook_q, hook_k, hook_rot_q or "
                "hook_rot_k of the layer instead"
            )
    given = numbers(pos, "pos")
    positions = None if given is None else chosen(given, n_tokens, "pos", "the prompt")
    heads = numbers(head, "head")
    if heads is not None:
        n_heads = n_heads_of(lens, names[0])
        if n_heads is None:
            raise InputError(f"{names[0]} has no heads; leave head= out, or choose what='head'")
        heads = chosen(heads, n_heads, "head", names[0])
    return Target(tuple(names), positions, heads, given)
