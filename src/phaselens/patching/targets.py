"""The activations that an edit covers: kinds of activations, and choices of layers, positions and heads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from phaselens.errors import InputError, close_matches, is_whole, short_form
from phaselens.lens.points import (
    HookFunction,
    heads_at,
    in_layer,
    is_attention,
    is_key_scores,
    is_matrix,
    names_keys,
    read_only_reason,
)

if TYPE_CHECKING:
    from torch import Tensor

    from phaselens.lens import HookedTransformer

#: Kinds of activations that can be swept, and the hook point of each within a layer.
KINDS: dict[str, str] = {
    "resid": "hook_resid_pre",
    "attn": "hook_attn_out",
    "mlp": "hook_mlp_out",
    "head": "attn.hook_z",
    "q": "attn.hook_q",
    "k": "attn.hook_k",
    "v": "attn.hook_v",
    "pattern": "attn.hook_pattern",
    "sink": "attn.hook_key_scores",
}

IndexChoice = int | Iterable[int] | str | None
"""Layers, positions or heads as a caller writes them: one number, several, or all (`"all"` or None)."""


def point_of_kind(what: str) -> str:
    """Return the hook point of a kind of activation, within its layer.

    Raises:
        InputError: with close matches, for a kind that does not exist.
    """
    if not isinstance(what, str) or what not in KINDS:
        raise InputError(f"what={short_form(what)}; {close_matches(str(what), KINDS)}")
    return KINDS[what]


def row_axis(name: str) -> int:
    """Return the dimension of the point's tensor that has a row for each position; for scores, that of queries."""
    return 2 if names_keys(name) else 1


def positions_first(name: str, tensor: Tensor) -> Tensor:
    """Return a view of the tensor [batch, …] at a point, with the position dimension directly after the batch.

    Scores and attention [batch, head, query, key] become [batch, query, head, key]; other tensors are as they are.
    """
    return tensor.transpose(1, 2) if names_keys(name) else tensor


def naming_keys(name: str, function: HookFunction, keys: tuple[int, ...] | None = None) -> HookFunction:
    """Return the hook function on a point, which names `keys` (by default key 0) to `hook_key_scores`."""
    if not is_key_scores(name):
        return function
    import torch

    from phaselens.lens.key_edits import KeyHook

    return KeyHook(function, torch.tensor([keys or (0,)]))


def n_heads_at(lens: HookedTransformer, name: str) -> int | None:
    """Return the number of heads of the tensor at this point, or None if it has no head dimension."""
    heads = heads_at(name)
    return {"head": lens.info.n_heads, "kv_head": lens.info.n_kv_heads}[heads] if heads else None


def without_iterator(choice: IndexChoice) -> IndexChoice:
    """Return `choice`, with an iterator read into a list, so that it can be read again."""
    return list(choice) if isinstance(choice, Iterator) else choice


def read_indices(choice: IndexChoice, noun: str) -> tuple[int, ...] | None:
    """Return the numbers of a choice as written, negative ones included; None for all.

    Raises:
        InputError: for anything but whole numbers.
    """
    if choice is None or (isinstance(choice, str) and choice == "all"):
        return None
    if isinstance(choice, str):
        raise InputError(f"{noun}={choice!r}: give a number, several, or 'all'")
    numbers: list[int]
    try:
        numbers = list(choice) if isinstance(choice, Iterable) else [choice]
    except TypeError:  # an array without dimensions
        numbers = [choice]  # type: ignore[list-item]
    for number in numbers:
        if not is_whole(number):
            raise InputError(f"{noun}={short_form(number)}: give whole numbers, or 'all'")
    if not numbers:
        raise InputError(f"{noun}: the list is empty; give a number, several, or 'all'")
    return tuple(dict.fromkeys(map(int, numbers)))


def resolve_indices(choice: IndexChoice, n: int, noun: str, owner: str) -> tuple[int, ...]:
    """Return the numbers of a choice counted from 0, of the `n` that `owner` has; negative ones count from the end.

    Raises:
        InputError: for a number out of range.
    """
    numbers = read_indices(choice, noun)
    if numbers is None:
        return tuple(range(n))
    for number in numbers:
        if not -n <= number < n:
            raise InputError(f"{noun} {number}: {owner} has {n}, 0 to {n - 1}")
    return tuple(dict.fromkeys(number % n for number in numbers))


def resolve_position(pos: int, n_tokens: int) -> int:
    """Return one position of a prompt, counted from 0; a negative one counts from the end.

    Raises:
        InputError: for anything but one position that the prompt has.
    """
    if not is_whole(pos):
        raise InputError(f"pos={short_form(pos)}: give one position, a whole number")
    return resolve_indices(int(pos), n_tokens, "pos", "the prompt")[0]


@dataclass(frozen=True)
class Target:
    """The activations that an edit covers: hook names, positions, heads and, for scores and attention, keys (None: all;
    at `hook_key_scores`, key 0).

    `positions` and `keys` count from 0 in the current prompts; `requested_positions` and `requested_keys` are those
    that the caller wrote, so that position −1 is the last one of any prompt.
    """

    names: tuple[str, ...]
    positions: tuple[int, ...] | None
    heads: tuple[int, ...] | None = None
    requested_positions: tuple[int, ...] | None = None
    keys: tuple[int, ...] | None = None
    requested_keys: tuple[int, ...] | None = None

    def fits(self, n_tokens: int) -> bool:
        """Return whether prompts of `n_tokens` tokens have all positions and keys of the target."""
        requested = (*(self.requested_positions or ()), *(self.requested_keys or ()))
        return all(-n_tokens <= number < n_tokens for number in requested)

    def for_length(self, n_tokens: int) -> Target:
        """Return the target for prompts of `n_tokens` tokens, with its positions as written if they do not fit."""
        positions, keys = self.requested_positions, self.requested_keys
        if self.fits(n_tokens):
            positions, keys = (
                None if requested is None else resolve_indices(requested, n_tokens, noun, "the prompt")
                for requested, noun in ((positions, "pos"), (keys, "key"))
            )
        return replace(self, positions=positions, keys=keys)

    def write(
        self, name: str, activation: Tensor, new: Tensor | float, start: int = 0, n_pads: int = 0
    ) -> Tensor:
        """Return a copy of `activation` with `new` written to the target.

        Args:
            name: the hook point.
            activation: a tensor whose first row is at position `start`.
            new: a number, or a tensor [1, …] of a whole prompt, whose rows are at positions 0, 1, …
            start: position of the first row; above 0 with a KV cache, negative for a pad.
            n_pads: the number of pads to the left of the text, which a matrix has as keys.
        """
        import torch

        axis = row_axis(name)
        end = start + activation.shape[axis]
        n_new_rows = end if not isinstance(new, torch.Tensor) else new.shape[axis]
        positions = range(n_new_rows) if self.positions is None else self.positions
        edited_positions = [
            position for position in positions if max(start, 0) <= position < min(end, n_new_rows)
        ]
        if not edited_positions:
            return activation
        if isinstance(new, torch.Tensor) and is_matrix(name):
            new = _pad_keys(name, new, activation.shape[-1], n_pads)
        rows = torch.tensor(edited_positions, device=activation.device)
        destination, source = self._index(name, rows - start), self._index(name, rows)
        edited = activation.clone()
        edited[destination] = new[source] if isinstance(new, torch.Tensor) else new
        if self.keys is None or is_key_scores(name):
            return edited
        columns = torch.tensor(self.keys, device=activation.device) + n_pads
        is_named = torch.isin(torch.arange(activation.shape[-1], device=activation.device), columns)
        return torch.where(is_named, edited, activation)

    def _index(self, name: str, rows: Tensor) -> tuple[slice | Tensor, ...]:
        """Return the index of some rows, and of the target's heads, in the tensor at a point."""
        import torch

        all_entries = slice(None)
        if self.heads is None:
            return (all_entries, all_entries, rows) if names_keys(name) else (all_entries, rows)
        heads = torch.tensor(self.heads, device=rows.device)
        # All pairs of a row and a head, in the order of the tensor's dimensions.
        return (
            (all_entries, heads[:, None], rows) if names_keys(name) else (all_entries, rows[:, None], heads)
        )


def _pad_keys(name: str, matrix: Tensor, n_keys: int, n_pads: int) -> Tensor:
    """Extend scores or weights [1, head, query, key] to `n_keys` keys, of which the first `n_pads` are pads.

    Pads and the keys after the prompt are hidden from the prompt's queries.
    """
    from torch.nn.functional import pad

    hidden = 0.0 if is_attention(name) else float("-inf")
    return pad(matrix, (n_pads, n_keys - n_pads - matrix.shape[-1]), value=hidden)


def resolve_target(
    lens: HookedTransformer,
    n_tokens: int,
    point: str | None,
    what: str | None,
    layer: IndexChoice,
    pos: IndexChoice,
    head: IndexChoice,
    key: IndexChoice = None,
) -> Target:
    """Return the target that a caller described, either by a whole hook name or by kind and layers.

    Raises:
        InputError: for a name, layer, position, head or key that does not exist, or contradicts another.
    """
    names = _target_names(lens, point, what, layer)
    for name in names:
        lens.require_hook(name)
        if reason := read_only_reason(name):
            raise InputError(f"{name}: {reason}")
        if lens.position_axis(name) != row_axis(name):
            raise InputError(
                f"{name} holds its heads before its positions in this family; edit attn.hook_q, hook_k, hook_rot_q or "
                "hook_rot_k of the layer instead"
            )
    requested = read_indices(pos, "pos")
    positions = None if requested is None else resolve_indices(requested, n_tokens, "pos", "the prompt")
    heads = read_indices(head, "head")
    if heads is not None:
        n_heads = n_heads_at(lens, names[0])
        if n_heads is None:
            raise InputError(f"{names[0]} has no heads; leave head= out, or choose what='head'")
        heads = resolve_indices(heads, n_heads, "head", names[0])
    requested_keys = read_indices(key, "key")
    keys = None if requested_keys is None else resolve_indices(requested_keys, n_tokens, "key", "the prompt")
    if keys is not None and not names_keys(names[0]):
        raise InputError(f"{names[0]} has no keys; leave key= out, or choose what='sink' or what='pattern'")
    return Target(tuple(names), positions, heads, requested, keys, requested_keys)


def _target_names(
    lens: HookedTransformer, point: str | None, what: str | None, layer: IndexChoice
) -> Sequence[str]:
    if point is None and what is None:
        raise InputError(
            "name a hook point ('blocks.3.hook_resid_post') or a kind of activation (what='resid')"
        )
    if point is not None and what is not None:
        raise InputError(f"{point!r} and what={what!r} both name activations; give only one of them")
    if point is None:
        assert what is not None
        name_in_layer = point_of_kind(what)
        layers = resolve_indices(layer, lens.info.n_layers, "layer", lens.info.label)
        return [in_layer(number, name_in_layer) for number in layers]
    if isinstance(point, str) and point in KINDS:
        raise InputError(f"{point!r} is a kind of activation, not a hook point; write what={point!r}")
    if layer is not None:
        raise InputError(f"{point!r} names its layer; leave layer= out, or write what= instead of the name")
    if not isinstance(point, str):
        raise InputError(f"expected the name of a hook point as text, received {short_form(point)}")
    return [point]
