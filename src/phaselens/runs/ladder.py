"""Conditions by one climb: the unedited residual goes up layer by layer, and every condition branches off below
its lowest edited layer. Only one residual is held, however many layers and conditions there are."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phaselens.plugin import Batch, Edit
from phaselens.runs.interventions import Editor

if TYPE_CHECKING:
    from torch import Tensor

    from phaselens.lens import HookedTransformer
    from phaselens.lens.components import AttentionReplay

FROM_TOKENS = -1

Run = Callable[[], "Tensor"]
"""Gives the final norm's output [batch, pos, d_model]."""


@dataclass(frozen=True)
class Branch:
    """One condition on one batch. `take` gets the final norm's output [batch, pos, d_model]; `guard` runs what it is
    given, and answers for what that raises."""

    editor: Editor
    take: Callable[[Tensor], None]
    guard: Callable[[Callable[[], None]], None]


def lowest_layer(edit: Edit, n_layers: int) -> int:
    """The layer from which a forward with this edit differs; n_layers for the final norm, −1 for the embedding."""
    if edit.layer is not None:
        return edit.layer
    return n_layers if edit.point.startswith("ln_final") else FROM_TOKENS


def climb(lens: HookedTransformer, batch: Batch, branches: Sequence[Branch]) -> Tensor:
    """Run every branch, and give the unedited model's final norm output [batch, pos, d_model]."""
    climber = _Climber(lens, batch)
    n_layers = lens.info.n_layers
    starts: dict[int, list[Branch]] = {}
    for branch in branches:
        start = min(lowest_layer(edit, n_layers) for edit in branch.editor.edits)
        starts.setdefault(start, []).append(branch)
    for start in sorted(starts):
        for branch, run in climber.runs(start, starts[start]):
            branch.guard(lambda branch=branch, run=run: branch.take(run()))  # type: ignore[misc]
    return climber.top()


#: Points of a layer that stand behind its attention, or are what it adds; `ln2.`… with all that is inside.
_AFTER_ATTENTION = ("hook_attn_out", "attn.hook_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post")
_PARTS_AFTER_ATTENTION = ("ln1_post.", "ln2.", "ln2_post.", "mlp.")
_AFTER_MLP = ("hook_mlp_out", "hook_resid_post")


def _points_in(branch: Branch, layer: int) -> list[str]:
    """The points that the branch edits in that layer, without `blocks.{layer}.`"""
    return [edit.point.split(".", 2)[2] for edit in branch.editor.edits if edit.layer == layer]


def _after_attention(branch: Branch, layer: int) -> bool:
    """Whether its lowest layer computes its attention as in the unedited model."""
    points = _points_in(branch, layer)
    return bool(points) and all(
        point in _AFTER_ATTENTION or point.startswith(_PARTS_AFTER_ATTENTION) for point in points
    )


def _after_mlp(branch: Branch, layer: int) -> bool:
    """Whether its lowest layer is changed at nothing but what the MLP adds, so that the layer need not run again."""
    points = _points_in(branch, layer)
    return bool(points) and all(point in _AFTER_MLP for point in points)


def _keep(seen: dict[str, Tensor], name: str, tensor: Tensor, hook: Any) -> None:
    """A hook that keeps what it is shown."""
    seen[name] = tensor


class _Climber:
    """The unedited residual [batch, pos, d_model] on its way up."""

    def __init__(self, lens: HookedTransformer, batch: Batch) -> None:
        import torch

        self._lens = lens
        self._batch = batch
        self._layer = 0
        self._residual: Tensor | None = None
        places = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)[None]
        self._positions: Callable[[], Tensor] = lambda: places
        # Some rotations depend on how long a text is, which a row of a padded batch does not show.
        self._stream = functools.partial(lens.stream, lengths=batch.lengths_on(lens.device))

    def to(self, layer: int) -> Tensor:
        """The residual that enters `layer`."""
        if self._residual is None:
            self._residual = self._stream(self._batch.tokens, stop_at_layer=layer)
        elif layer > self._layer:
            self._residual = self._stream(
                residual=self._residual, start_at_layer=self._layer, stop_at_layer=layer
            )
        self._layer = layer
        return self._residual

    def top(self) -> Tensor:
        """The unedited model's final norm output."""
        residual = self.to(self._lens.info.n_layers)
        return self._stream(residual=residual, start_at_layer=self._lens.info.n_layers)

    def runs(self, start: int, branches: Sequence[Branch]) -> Iterator[tuple[Branch, Run]]:
        """Each branch whose lowest layer is `start`, in the order in which they must be run, and how to run it."""
        if start == FROM_TOKENS:
            yield from ((branch, functools.partial(self._from_tokens, branch)) for branch in branches)
            return
        self.to(start)
        behind = []
        for branch in branches:
            if _after_attention(branch, start):
                behind.append(branch)
            else:
                yield branch, functools.partial(self._resumed, branch)
        if behind:
            yield from self._past_attention(start, behind)

    def _from_tokens(self, branch: Branch) -> Tensor:
        """A whole forward under the branch's edits."""
        return self._stream(self._batch.tokens, branch.editor.hooks(self._positions))

    def _resumed(self, branch: Branch) -> Tensor:
        """The forward under the branch's edits from the present layer on."""
        hooks = branch.editor.hooks(self._positions)
        return self._stream(hooks=hooks, residual=self._residual, start_at_layer=self._layer)

    def _past_attention(self, layer: int, branches: Sequence[Branch]) -> Iterator[tuple[Branch, Run]]:
        """The branches that edit `layer` behind its attention, which is computed once for all of them, and for the
        unedited model. Where they change only what its MLP adds, they start above the layer, if the sum that the
        model makes of the residual and the MLP's output is exactly ours."""
        import torch

        names = [f"blocks.{layer}.{point}" for point in ("hook_resid_mid", "hook_mlp_out")]
        has_late = any(_after_mlp(branch, layer) for branch in branches)
        known = has_late and all(self._lens.find_hook(name) is not None for name in names)
        seen: dict[str, Tensor] = {}
        catch = [(name, functools.partial(_keep, seen, name)) for name in names if known]
        with self._lens.attention_replay(layer) as replay:
            above = self._stream(
                hooks=catch, residual=self._residual, start_at_layer=layer, stop_at_layer=layer + 1
            )
        is_sum = known and torch.equal(seen[names[0]] + seen[names[1]], above)
        for branch in branches:
            if is_sum and _after_mlp(branch, layer):
                mid, added = (seen[name] for name in names)
                yield branch, functools.partial(self._edited, branch, layer, mid, added, above)
            else:
                yield branch, functools.partial(self._replayed, branch, replay)
        self._residual, self._layer = above, layer + 1

    def _replayed(self, branch: Branch, replay: AttentionReplay) -> Tensor:
        """`_resumed`, with the present layer's attention as it was."""
        with replay:
            return self._resumed(branch)

    def _edited(self, branch: Branch, layer: int, mid: Tensor, added: Tensor, above: Tensor) -> Tensor:
        positions = self._positions()
        points = [edit.point for edit in branch.editor.edits]
        for number, point in enumerate(points):
            if point == f"blocks.{layer}.hook_mlp_out":
                new = branch.editor.apply(number, added, positions)
                added = added if new is None else new
                above = mid + added
        for number, point in enumerate(points):
            if point == f"blocks.{layer}.hook_resid_post":
                new = branch.editor.apply(number, above, positions)
                above = above if new is None else new
        higher = [
            hook
            for hook, edit in zip(branch.editor.hooks(self._positions), branch.editor.edits, strict=True)
            if edit.layer is None or edit.layer > layer
        ]
        return self._stream(hooks=higher, residual=above, start_at_layer=layer + 1)
