"""Putting edits on a model: positions that are absolute in every phase, and proof that an edit did something."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from phaselens.errors import InputError
from phaselens.plugin import Batch, Condition, Edit, Proof, Site

if TYPE_CHECKING:
    from torch import Tensor

    from phaselens.lens import HookedTransformer

#: Points whose rows are queries at dimension 2, and heads at dimension 1; elsewhere it is 1 and 2.
_MATRICES = ("hook_pattern", "hook_attn_scores")
_WITH_HEADS = (
    "hook_q", "hook_k", "hook_v", "hook_z", "hook_rot_q", "hook_rot_k", "hook_attended", *_MATRICES
)  # fmt: skip

Hook = tuple[str, Callable[["Tensor", Any], "Tensor | None"]]


class Editor:
    """The edits of one condition on one model, and what each of them did so far (`proofs`, by hook point).

    Raises:
        InputError: for a hook point that the model does not have, or that cannot be edited so.
    """

    def __init__(self, lens: HookedTransformer, edits: Sequence[Edit], batch: Batch | None = None) -> None:
        self._lens = lens
        self._batch = batch
        self.edits = [one for edit in edits for one in edit.in_layers(lens.info.n_layers)]
        self.proofs: dict[str, Proof] = {}
        self._names: list[str] = []
        for edit in self.edits:
            lens.require_hook(edit.point)
            _require_editable(edit)
            known = sum(name.split(" ")[0] == edit.point for name in self.proofs)
            name = f"{edit.point} ({known + 1})" if known else edit.point
            self._names.append(name)
            self.proofs[name] = Proof(constant=not callable(edit.to))

    def hooks(self, positions: Callable[[], Tensor]) -> list[Hook]:
        """A hook an edit, in their order; `positions` gives those of the rows in the forward that runs."""
        return [
            (edit.point, functools.partial(self._fire, number, positions))
            for number, edit in enumerate(self.edits)
        ]

    def _fire(
        self, number: int, positions: Callable[[], Tensor], tensor: Tensor, hook: Any = None
    ) -> Tensor | None:
        return self.apply(number, tensor, positions())

    def apply(self, number: int, tensor: Tensor, positions: Tensor) -> Tensor | None:
        """What edit `number` makes of `tensor`, whose rows stand at `positions` [batch or 1, pos]; None: as it is."""
        import torch

        edit, proof = self.edits[number], self.proofs[self._names[number]]
        positions = positions.to(tensor.device)
        rows = _rows(edit, tensor, positions, self._real(positions))
        if not bool(rows.any()):
            return None
        rows = rows.expand(tensor.shape[0], -1)
        where = _shaped(edit, tensor, rows)
        new = self._new(edit, tensor, positions)
        edited = torch.where(where, new, tensor)
        proof.written = True
        proof.changed = proof.changed or bool((edited != tensor).any())
        return edited

    def _real(self, positions: Tensor) -> Tensor:
        """Rows that are a text's own; those of pads are left as they are."""
        if self._batch is None:
            return positions >= 0
        return positions < self._batch.lengths_on(positions.device)[:, None]

    def _new(self, edit: Edit, tensor: Tensor, positions: Tensor) -> Tensor:
        import torch

        if not callable(edit.to):
            return torch.full_like(tensor, edit.to)
        weight = functools.partial(self._lens.weight_of, edit.layer)
        before = tensor._version
        new = edit.to(tensor, Site(edit.point, edit.layer, positions, self._batch, weight))
        if tensor._version != before:
            raise InputError(f"the edit of {edit.point} changed its tensor in place; return a new one")
        if not isinstance(new, torch.Tensor) or new.shape != tensor.shape:
            found = list(new.shape) if isinstance(new, torch.Tensor) else type(new).__name__
            raise InputError(
                f"the edit of {edit.point} returned {found}; return the new tensor, {list(tensor.shape)}"
            )
        return new.to(tensor.device, tensor.dtype)


def _require_editable(edit: Edit) -> None:
    last = edit.point.rsplit(".", 1)[-1]
    if edit.heads is not None and last not in _WITH_HEADS:
        raise InputError(f"edit of {edit.point}: it has no heads; leave `heads` out")
    if edit.point.startswith("unembed"):
        raise InputError(
            f"edit of {edit.point}: logits are never built whole; edit ln_final.hook_out instead"
        )


def _rows(edit: Edit, tensor: Tensor, positions: Tensor, real: Tensor) -> Tensor:
    """[batch or 1, pos], True where the edit writes."""
    import torch

    at = 2 if edit.point.endswith(_MATRICES) else 1
    if tensor.dim() <= at or tensor.shape[at] != positions.shape[1]:
        raise InputError(
            f"edit of {edit.point}: its tensor {list(tensor.shape)} has no dimension of {positions.shape[1]} positions"
        )
    if edit.positions is None:
        return real
    return real & torch.isin(positions, torch.tensor(list(edit.positions), device=positions.device))


def _shaped(edit: Edit, tensor: Tensor, rows: Tensor) -> Tensor:
    """`rows` [batch, pos], and the edit's heads, in the shape of `tensor`."""
    import torch

    matrix = edit.point.endswith(_MATRICES)
    if tensor.dim() == 3:
        return rows[:, :, None]
    where = rows[:, None, :, None] if matrix else rows[:, :, None, None]
    if edit.heads is None:
        return where
    at = 1 if matrix else 2
    heads = torch.zeros(tensor.shape[at], dtype=torch.bool, device=tensor.device)
    for head in edit.heads:
        if head >= len(heads):
            raise InputError(f"edit of {edit.point}: head {head} of {len(heads)}")
        heads[head] = True
    return where & (heads[None, :, None, None] if matrix else heads[None, None, :, None])


class _Position:
    """Follows the model's own forward calls, and so knows where the rows of each stand."""

    def __init__(self) -> None:
        self.now: Tensor | None = None

    def __call__(self) -> Tensor:
        if self.now is None:
            raise InputError("an edit was reached outside of the model's own forward; run the whole model")
        return self.now

    def note(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A hook before the forward of the model's body: positions [batch or 1, pos], pads at −1."""
        import torch

        given = kwargs.get("input_ids")
        given = args[0] if given is None and args else given
        given = kwargs.get("inputs_embeds") if given is None else given
        if given is None:
            raise InputError("the model was called without tokens; edits do not know where they stand")
        n_rows = given.shape[1]
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        past = kwargs.get("past_key_values")
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            counted = mask.long().cumsum(-1) - 1
            self.now = torch.where(mask.bool(), counted, -1)[:, -n_rows:]
        elif isinstance(positions, torch.Tensor):
            self.now = positions if positions.dim() == 2 else positions[None]
        else:
            seen = 0 if past is None else int(past.get_seq_length())
            self.now = torch.arange(seen, seen + n_rows, device=given.device)[None]


@contextmanager
def applied(
    lens: HookedTransformer, condition: Condition | Sequence[Edit], *, batch: Batch | None = None
) -> Iterator[dict[str, Proof]]:
    """Every forward inside runs under the condition: measuring passes, `generate` with and without a KV cache.

    Args:
        lens: the model.
        condition: a condition, or its edits.
        batch: the texts, for edits that look at them.

    Yields:
        What each edit did so far, by hook point.

    Raises:
        InputError: for a hook point that the model does not have, or an edit that does not fit it.

    >>> import phaselens, torch
    >>> from phaselens.plugin import Edit
    >>> from phaselens.testing import tiny_model
    >>> lens = phaselens.load(tiny_model("llama"))
    >>> tokens = torch.tensor([[0, 5, 7, 9]])
    >>> with applied(lens, [Edit("blocks.0.hook_mlp_out", 0.0, positions=[0])]) as proofs:
    ...     edited = lens.stream(tokens)
    >>> bool(torch.equal(edited, lens.stream(tokens))), proofs["blocks.0.hook_mlp_out"].changed
    (False, True)
    """
    editor = Editor(lens, condition.edits if isinstance(condition, Condition) else condition, batch)
    position = _Position()
    handle = lens.original_model.base_model.register_forward_pre_hook(position.note, with_kwargs=True)
    try:
        with lens.hooks(fwd_hooks=editor.hooks(position)):
            yield editor.proofs
    finally:
        handle.remove()
