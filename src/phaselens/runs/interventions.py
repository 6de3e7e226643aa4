"""Putting edits on a model: positions that are absolute in every phase, and proof that an edit did something."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from phaselens.errors import InputError, require_kind
from phaselens.lens.info import require_lens
from phaselens.lens.points import heads_at
from phaselens.plugin import Batch, Condition, Edit, Proof, Site
from phaselens.plugin.views import lazy_copy

if TYPE_CHECKING:
    from torch import Tensor

    from phaselens.lens import HookedTransformer
    from phaselens.lens.projection import Projection

Hook = tuple[str, Callable[["Tensor", Any], "Tensor | None"]]


def weight_of(lens: HookedTransformer, layer: int | None, name: str) -> Tensor:
    """`lens.weight_of`, for a metric or an edit: what is written into it does not reach the model."""
    return lazy_copy(lens.weight_of(layer, name))


def projection_of(lens: HookedTransformer, layer: int | None, name: str) -> Projection:
    """`lens.projection_of`, for a metric: what is written into its tensors does not reach the model."""
    served = lens.projection_of(layer, name)
    return replace(served, weight=lazy_copy(served.weight), bias=lazy_copy(served.bias))


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
        #: Measured before any edit is in place: a measurement is a forward of its own.
        self._axes: dict[str, int | None] = {}
        for edit in self.edits:
            lens.require_hook(edit.point)
            _require_editable(edit)
            self._axes[edit.point] = lens.position_axis(edit.point)
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
        axis = self._axes[edit.point]
        rows = _rows(edit, tensor, axis, positions, self._real(positions))
        if not bool(rows.any()):
            return None
        where = _shaped(edit, tensor, axis or 1, rows.expand(tensor.shape[0], -1))
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

        from phaselens.lens.interface import version_of

        if not callable(edit.to):
            return torch.full_like(tensor, edit.to)
        weight = functools.partial(weight_of, self._lens, edit.layer)
        given = lazy_copy(tensor)
        version = version_of(given)
        batch = None if self._batch is None else self._batch.apart()
        new = edit.to(given, Site(edit.point, edit.layer, lazy_copy(positions), batch, weight))
        if version_of(given) != version:
            raise InputError(f"the edit of {edit.point} changed its tensor in place; return a new one")
        if not isinstance(new, torch.Tensor) or new.shape != tensor.shape:
            found = list(new.shape) if isinstance(new, torch.Tensor) else type(new).__name__
            raise InputError(
                f"the edit of {edit.point} returned {found}; return the new tensor, {list(tensor.shape)}"
            )
        return new.to(tensor.device, tensor.dtype)


def _require_editable(edit: Edit) -> None:
    if edit.heads is not None and heads_at(edit.point) is None:
        raise InputError(f"edit of {edit.point}: it has no heads; leave `heads` out")
    if edit.point.startswith(("unembed", "hook_unembed")):
        raise InputError(
            f"edit of {edit.point}: logits are never built whole; edit ln_final.hook_out instead"
        )


def _rows(edit: Edit, tensor: Tensor, axis: int | None, positions: Tensor, real: Tensor) -> Tensor:
    """[batch or 1, pos], True where the edit writes; `axis` is the tensor's dimension of positions."""
    import torch

    if axis is None or tensor.dim() < 3 or tensor.dim() > 4 or tensor.shape[axis] != positions.shape[1]:
        raise InputError(
            f"edit of {edit.point}: its tensor {list(tensor.shape)} has no dimension of {positions.shape[1]} positions"
        )
    if edit.positions is None:
        return real
    return real & torch.isin(positions, torch.tensor(list(edit.positions), device=positions.device))


def _shaped(edit: Edit, tensor: Tensor, axis: int, rows: Tensor) -> Tensor:
    """`rows` [batch, pos], and the edit's heads, in the shape of `tensor`, whose positions are at dimension `axis`."""
    import torch

    if tensor.dim() == 3:
        return rows[:, :, None]
    where = rows[:, None, :, None] if axis == 2 else rows[:, :, None, None]
    if edit.heads is None:
        return where
    head_axis = 3 - axis
    heads = torch.zeros(tensor.shape[head_axis], dtype=torch.bool, device=tensor.device)
    for head in edit.heads:
        if head >= len(heads):
            raise InputError(f"edit of {edit.point}: head {head} of {len(heads)}")
        heads[head] = True
    return where & (heads[None, :, None, None] if axis == 2 else heads[None, None, :, None])


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
    require_lens("lens", lens)
    if not isinstance(condition, Condition):
        condition = Condition("applied", condition)  # which checks the edits
    if batch is not None:
        require_kind("batch", batch, Batch, "as a run makes it")
    editor = Editor(lens, condition.edits, batch)
    with lens.hooks(fwd_hooks=editor.hooks(lens.rows.positions)):
        yield editor.proofs
