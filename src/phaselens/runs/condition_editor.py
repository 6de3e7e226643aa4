"""Apply a condition's edits to a model at absolute positions, and record the effect of each edit."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from phaselens.errors import InputError, is_whole, require_kind, short_form
from phaselens.lens.info import require_lens
from phaselens.lens.points import Hook, HookFunction, heads_at, is_key_scores, is_logits
from phaselens.plugin import Batch, Condition, Edit, EditEffect, Site
from phaselens.plugin.views import lazy_copy
from phaselens.runs.weights import copied_weight

if TYPE_CHECKING:
    from torch import Tensor

    from phaselens.lens import HookedTransformer


class ConditionEditor:
    """The edits of one condition on one model. `effects` records what each edit did so far, by hook point.

    Raises:
        InputError: for a hook point that the model does not have, or that cannot be edited this way.
    """

    def __init__(self, lens: HookedTransformer, edits: Sequence[Edit], batch: Batch | None = None) -> None:
        self._lens = lens
        self._batch = batch
        self.edits = [layer_edit for edit in edits for layer_edit in _in_existing_layers(lens, edit)]
        self.effects: dict[str, EditEffect] = {}
        self._names: list[str] = []
        #: Read before any edit is in place, because that takes a forward.
        self._position_axes: dict[str, int | None] = {}
        for number, edit in enumerate(self.edits):
            lens.require_hook(edit.point)
            _require_editable(edit)
            self._position_axes[edit.point] = lens.position_axis(edit.point)
            n_before = sum(previous.point == edit.point for previous in self.edits[:number])
            name = f"{edit.point} ({n_before + 1})" if n_before else edit.point
            self._names.append(name)
            self.effects[name] = EditEffect(constant=not callable(edit.to))

    def hooks(
        self, positions: Callable[[], Tensor], key_positions: Callable[[], Tensor] | None = None
    ) -> list[Hook]:
        """Return one hook per edit, in order.

        `positions` returns the positions of the running forward's rows, `key_positions` those of a matrix' columns; by
        default columns are at 0, 1, …, as without a KV cache and without pads on the left.
        """
        return [
            (
                edit.point,
                self.naming_keys(number, functools.partial(self._hook, number, positions, key_positions)),
            )
            for number, edit in enumerate(self.edits)
        ]

    def _hook(
        self,
        number: int,
        positions: Callable[[], Tensor],
        key_positions: Callable[[], Tensor] | None,
        tensor: Tensor,
        hook: object = None,
    ) -> Tensor | None:
        return self.apply(number, tensor, positions(), key_positions and key_positions())

    def naming_keys(self, number: int, function: HookFunction) -> HookFunction:
        """Return the hook function of edit `number`, which names the edit's keys to `hook_key_scores`."""
        edit = self.edits[number]
        if not is_key_scores(edit.point):
            return function
        from phaselens.lens.key_edits import KeyHook

        return KeyHook(function, edited_keys(edit, self._batch, default=[0]))

    def apply(
        self, number: int, tensor: Tensor, positions: Tensor, key_positions: Tensor | None = None
    ) -> Tensor | None:
        """Return `tensor` after edit `number`, or None if the edit does not apply to it.

        The rows of `tensor` have the absolute `positions` [batch or 1, pos], the columns of a matrix the absolute
        `key_positions` [batch or 1, key].
        """
        import torch

        edit, effect = self.edits[number], self.effects[self._names[number]]
        positions = positions.to(tensor.device)
        axis = self._position_axes[edit.point]
        rows = _edited_rows(edit, tensor, axis, positions, self._is_real(positions))
        if not bool(rows.any()):
            return None
        if len(tensor) == 1 < len(rows):  # one row for all texts, as of cos and sin
            rows = rows.any(0, keepdim=True)
        mask = _broadcast_mask(edit, tensor, axis or 1, rows.expand(tensor.shape[0], -1))
        if edit.entries is not None:
            mask = mask & _edited_entries(edit, tensor)
        if edit.keys is not None and not is_key_scores(edit.point):
            mask = mask & self._edited_columns(edit, tensor, key_positions)
        if edit.keys is not None or is_key_scores(edit.point):
            mask = mask & (tensor != -torch.inf)  # a key that the query does not see cannot be edited
        if not bool(mask.any()):
            return None
        edited = torch.where(mask, self._replacement(edit, tensor, positions), tensor)
        effect.written = True
        effect.changed = effect.changed or bool((edited != tensor).any())
        return edited

    def _edited_columns(self, edit: Edit, tensor: Tensor, key_positions: Tensor | None) -> Tensor:
        """Return [batch or 1, 1, 1, key], True for the columns of the keys that the edit names."""
        import torch

        columns = torch.arange(tensor.shape[-1])[None] if key_positions is None else key_positions
        keys = edited_keys(edit, self._batch).to(tensor.device)
        named = (columns.to(tensor.device)[:, None, :] == keys[:, :, None]) & (keys >= 0)[:, :, None]
        return named.any(1)[:, None, None, :]

    def _is_real(self, positions: Tensor) -> Tensor:
        """Return [batch or 1, pos], True for rows of a text and False for pads, which are never edited."""
        if self._batch is None:
            return positions >= 0
        return positions < self._batch.lengths_on(positions.device)[:, None]

    def _replacement(self, edit: Edit, tensor: Tensor, positions: Tensor) -> Tensor:
        """Return the values that the edit writes, in the shape of `tensor`."""
        import torch

        from phaselens.lens.attention_owner import version_of

        if not callable(edit.to):
            return torch.full_like(tensor, edit.to)
        weight = functools.partial(copied_weight, self._lens, edit.layer)
        argument = lazy_copy(tensor)
        version = version_of(argument)
        batch = None if self._batch is None else self._batch.private_copy()
        replacement = edit.to(argument, Site(edit.point, edit.layer, lazy_copy(positions), batch, weight))
        if version_of(argument) != version:
            raise InputError(f"the edit of {edit.point} changed its tensor in place; return a new one")
        if not isinstance(replacement, torch.Tensor) or replacement.shape != tensor.shape:
            received = (
                list(replacement.shape)
                if isinstance(replacement, torch.Tensor)
                else type(replacement).__name__
            )
            raise InputError(
                f"the edit of {edit.point} returned {received}; return the new tensor, {list(tensor.shape)}"
            )
        return replacement.to(tensor.device, tensor.dtype)


def _in_existing_layers(lens: HookedTransformer, edit: Edit) -> list[Edit]:
    """Return one edit for each layer that has the point; of a point that no layer has, all of them."""
    edits = edit.in_layers(lens.info.n_layers)
    existing = [layer_edit for layer_edit in edits if lens.find_hook(layer_edit.point) is not None]
    return existing if existing and "{layer}" in edit.point else edits


def edited_keys(edit: Edit, batch: Batch | None, default: Sequence[int] = ()) -> Tensor:
    """Return the absolute positions [batch or 1, n] of the keys that the edit names, by text; −1 for no key.

    An edit that names none has the `default`.
    """
    import torch

    if not callable(edit.keys):
        return torch.tensor([list(default if edit.keys is None else edit.keys)], dtype=torch.long)
    if batch is None:
        raise InputError(
            f"edit of {edit.point}: its keys depend on the texts; apply it to texts or to a prompt, or list the keys"
        )
    keys: object = edit.keys(batch.private_copy())
    if not isinstance(keys, Sequence) or isinstance(keys, str | bytes) or len(keys) != batch.n:
        raise InputError(
            f"edit of {edit.point}: keys returned {short_form(keys)}; return one position, or None, for each of the "
            f"batch's {batch.n} texts"
        )
    for key in keys:
        if key is not None and (not is_whole(key) or key < 0):
            raise InputError(
                f"edit of {edit.point}: keys returned {key!r}; give whole numbers from 0, or None"
            )
    return torch.tensor([[-1 if key is None else key] for key in keys], dtype=torch.long)


def _require_editable(edit: Edit) -> None:
    if edit.heads is not None and heads_at(edit.point) is None:
        raise InputError(f"edit of {edit.point}: this point has no heads; leave `heads` out")
    if is_logits(edit.point):
        raise InputError(
            f"edit of {edit.point}: all logits are never computed at once; edit ln_final.hook_out instead"
        )


def _edited_rows(edit: Edit, tensor: Tensor, axis: int | None, positions: Tensor, is_real: Tensor) -> Tensor:
    """Return [batch or 1, pos], True where the edit writes; `axis` is the tensor's dimension of positions."""
    import torch

    if axis is None or tensor.dim() < 3 or tensor.dim() > 4 or tensor.shape[axis] != positions.shape[1]:
        raise InputError(
            f"edit of {edit.point}: its tensor {list(tensor.shape)} has no dimension of {positions.shape[1]} positions"
        )
    if edit.positions is None:
        return is_real
    return is_real & torch.isin(positions, torch.tensor(list(edit.positions), device=positions.device))


def _broadcast_mask(edit: Edit, tensor: Tensor, axis: int, rows: Tensor) -> Tensor:
    """Return True in `rows` [batch, pos] and the edit's heads, broadcastable to `tensor` with positions at `axis`."""
    import torch

    if tensor.dim() == 3:
        return rows[:, :, None]
    mask = rows[:, None, :, None] if axis == 2 else rows[:, :, None, None]
    if edit.heads is None:
        return mask
    head_axis = 3 - axis
    heads = torch.zeros(tensor.shape[head_axis], dtype=torch.bool, device=tensor.device)
    for head in edit.heads:
        if head >= len(heads):
            raise InputError(f"edit of {edit.point}: head {head} of {len(heads)}")
        heads[head] = True
    return mask & (heads[None, :, None, None] if axis == 2 else heads[None, None, :, None])


def _edited_entries(edit: Edit, tensor: Tensor) -> Tensor:
    """Return [entry], True for the entries of the tensor's last dimension that the edit names."""
    import torch

    named = torch.zeros(tensor.shape[-1], dtype=torch.bool, device=tensor.device)
    for entry in edit.entries or ():
        if entry >= len(named):
            raise InputError(f"edit of {edit.point}: entry {entry} of {len(named)}")
        named[entry] = True
    return named


def applied(
    lens: HookedTransformer, condition: Condition | Sequence[Edit], *, batch: Batch | None = None
) -> AbstractContextManager[dict[str, EditEffect]]:
    """Run every forward inside under the condition: measuring passes, and `generate` with and without a KV cache.

    Args:
        lens: the model.
        condition: a condition, or its edits.
        batch: the texts, for edits that read them.

    Yields:
        The effect of each edit so far, by hook point.

    Raises:
        InputError: for a hook point that the model does not have, or an edit that does not fit it.

    >>> import phaselens, torch
    >>> from phaselens.plugin import Edit
    >>> from phaselens.testing import tiny_model
    >>> lens = phaselens.load(tiny_model("llama"))
    >>> tokens = torch.tensor([[0, 5, 7, 9]])
    >>> with applied(lens, [Edit("blocks.0.hook_mlp_out", 0.0, positions=[0])]) as effects:
    ...     edited = lens.stream(tokens)
    >>> bool(torch.equal(edited, lens.stream(tokens))), effects["blocks.0.hook_mlp_out"].changed
    (False, True)
    """
    require_lens("lens", lens)
    if not isinstance(condition, Condition):
        condition = Condition("applied", condition)  # which checks the edits
    if batch is not None:
        require_kind("batch", batch, Batch, "as a run makes it")
    from phaselens.lens.ownership import OwnedContext

    editor = ConditionEditor(lens, condition.edits, batch)
    return OwnedContext(lens, functools.partial(_editing, lens, editor))


@contextmanager
def _editing(lens: HookedTransformer, editor: ConditionEditor) -> Iterator[dict[str, EditEffect]]:
    with lens.hooks(fwd_hooks=editor.hooks(lens.rows.positions, lens.rows.key_positions)):
        yield editor.effects
