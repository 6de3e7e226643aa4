"""Run all conditions of a batch in one pass, resuming each at its lowest edited layer.

The residual of the unedited model is computed layer by layer, and every condition branches off from it. Only one
residual is held, however many layers and conditions there are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phaselens.lens.points import (
    in_layer,
    is_after_attention,
    is_after_mlp,
    is_after_rotation,
    is_in_final_norm,
    layer_and_point,
)
from phaselens.plugin import Batch, Edit
from phaselens.runs.condition_editor import ConditionEditor

if TYPE_CHECKING:
    from torch import Tensor

    from phaselens.lens import HookedTransformer
    from phaselens.lens.ownership import OwnedContext
    from phaselens.lens.points import Hook

FROM_TOKENS = -1

ReadingForward = tuple[Sequence["Hook"], dict[str, Any]]
"""Hooks that read activations, and the options of `stream` for them."""
Forward = Callable[[], "Tensor"]
"""Runs a forward and returns the final norm's output [batch, pos, d_model]."""


@dataclass(frozen=True)
class Branch:
    """One condition on one batch.

    `receive` takes the final norm's output [batch, pos, d_model]. `guard` calls the function that it receives and
    handles its exceptions. `reading` is a context that yields the hooks and the options of a forward in which a metric
    reads activations; such a forward shares no computation with others. None without any.
    """

    editor: ConditionEditor
    receive: Callable[[Tensor], None]
    guard: Callable[[Callable[[], None]], None]
    reading: Callable[[], AbstractContextManager[ReadingForward]] | None = None


def lowest_layer(edit: Edit, n_layers: int) -> int:
    """Return the lowest layer that the edit affects; n_layers for the final norm, −1 for the embedding."""
    if edit.layer is not None:
        return edit.layer
    return n_layers if is_in_final_norm(edit.point) else FROM_TOKENS


def run_branches(
    lens: HookedTransformer,
    batch: Batch,
    branches: Sequence[Branch],
    receive_unedited: Callable[[Tensor], object] | None = None,
) -> Tensor:
    """Run every branch, and return the unedited model's final norm output [batch, pos, d_model].

    `receive_unedited` takes that output before any branch runs.
    """
    baseline = BaselinePass(lens, batch)
    n_layers = lens.info.n_layers
    branches_by_layer: dict[int, list[Branch]] = {}
    for branch in branches:
        lowest = min(lowest_layer(edit, n_layers) for edit in branch.editor.edits)
        branches_by_layer.setdefault(lowest, []).append(branch)
    final = None
    if receive_unedited is not None:
        resumed_layers = [layer for layer in branches_by_layer if layer != FROM_TOKENS]
        final = baseline.final_output(min(resumed_layers, default=n_layers))
        receive_unedited(final)
    for lowest in sorted(branches_by_layer):
        for branch, forward in baseline.forwards(lowest, branches_by_layer[lowest]):
            branch.guard(lambda branch=branch, forward=forward: branch.receive(forward()))  # type: ignore[misc]
    return baseline.final_output(n_layers) if final is None else final


def _edited_points(branch: Branch, layer: int) -> list[str]:
    """Return the points that the branch edits in that layer, without `blocks.{layer}.`"""
    return [layer_and_point(edit.point)[1] for edit in branch.editor.edits if edit.layer == layer]


def _keeps_attention(branch: Branch, layer: int) -> bool:
    """Whether the attention of `layer`, the branch's lowest, is computed as in the unedited model."""
    points = _edited_points(branch, layer)
    return bool(points) and all(map(is_after_attention, points))


def _keeps_kernels(branch: Branch, layer: int) -> bool:
    """Whether queries, keys and values of `layer`, the branch's lowest, are computed as in the unedited model."""
    points = _edited_points(branch, layer)
    return bool(points) and all(map(is_after_rotation, points))


def _keeps_mlp(branch: Branch, layer: int) -> bool:
    """Whether `layer`, the branch's lowest, is edited only after its MLP, so that it need not run again."""
    points = _edited_points(branch, layer)
    return bool(points) and all(map(is_after_mlp, points))


def _store(activations: dict[str, Tensor], name: str, tensor: Tensor, hook: object) -> None:
    """Store the activation under `name`."""
    activations[name] = tensor


class BaselinePass:
    """The unedited model's forward over one batch, layer by layer, and the conditions that resume from it.

    Each call that names a layer moves the pass up; a lower layer cannot be reached again.
    """

    def __init__(self, lens: HookedTransformer, batch: Batch) -> None:
        import torch

        self._lens = lens
        self._can_resume = lens.resume_problem is None
        self._batch = batch
        #: `_residual` [batch, pos, d_model] enters this layer.
        self._layer = 0
        self._residual: Tensor | None = None
        positions = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)[None]
        self._positions: Callable[[], Tensor] = lambda: positions
        # Some rotations depend on the length of a text, which a row of a padded batch does not show.
        self._stream = functools.partial(lens.stream, lengths=batch.lengths_on(lens.device))

    def advance_to(self, layer: int) -> Tensor:
        """Return the residual that enters `layer`."""
        if self._residual is None:
            self._residual = self._stream(self._batch.tokens, stop_at_layer=layer)
        elif layer > self._layer:
            self._residual = self._stream(
                residual=self._residual, start_at_layer=self._layer, stop_at_layer=layer
            )
        self._layer = layer
        return self._residual

    def final_output(self, layer: int) -> Tensor:
        """Return the unedited model's final norm output [batch, pos, d_model]; the pass moves up to `layer` only."""
        if not self._can_resume:
            return self._stream(self._batch.tokens)
        return self._stream(residual=self.advance_to(layer), start_at_layer=layer)

    def forwards(self, lowest: int, branches: Sequence[Branch]) -> Iterator[tuple[Branch, Forward]]:
        """Yield the forward of each branch whose lowest layer is `lowest`; they must be run in this order."""
        if lowest == FROM_TOKENS or not self._can_resume:
            yield from ((branch, functools.partial(self._from_tokens, branch)) for branch in branches)
            return
        self.advance_to(lowest)
        sharing_attention = []
        kernels = self._lens.kernel_replay(lowest) if lowest < self._lens.info.n_layers else None
        for branch in branches:
            if branch.reading is not None:
                yield branch, functools.partial(self._resumed, branch)
            elif _keeps_attention(branch, lowest):
                sharing_attention.append(branch)
            elif kernels is not None and _keeps_kernels(branch, lowest):
                yield branch, functools.partial(self._replayed, branch, kernels)
            else:
                yield branch, functools.partial(self._resumed, branch)
        if sharing_attention:
            yield from self._after_attention(lowest, sharing_attention)

    def _from_tokens(self, branch: Branch) -> Tensor:
        """Run a forward from the tokens under the branch's edits."""
        return self._run(branch, tokens=self._batch.tokens)

    def _resumed(self, branch: Branch) -> Tensor:
        """Run a forward under the branch's edits from the current layer on."""
        return self._run(branch, residual=self._residual, start_at_layer=self._layer)

    def _run(self, branch: Branch, **inputs: Any) -> Tensor:
        """Run a forward under the branch's edits, with the hooks that read after them."""
        hooks = branch.editor.hooks(self._positions)
        if branch.reading is None:
            return self._stream(hooks=hooks, **inputs)
        with branch.reading() as (reading_hooks, options):
            return self._stream(hooks=[*hooks, *reading_hooks], **inputs, **options)

    def _after_attention(self, layer: int, branches: Sequence[Branch]) -> Iterator[tuple[Branch, Forward]]:
        """Yield forwards of branches that edit `layer` after its attention, which is computed once for all of them.

        A branch that edits only after the MLP resumes above the layer, provided that the model's own output of the
        layer equals the residual plus the MLP's output exactly.
        """
        import torch

        names = [in_layer(layer, point) for point in ("hook_resid_mid", "hook_mlp_out")]
        can_skip = any(_keeps_mlp(branch, layer) for branch in branches) and all(
            self._lens.find_hook(name) is not None for name in names
        )
        activations: dict[str, Tensor] = {}
        hooks = [(name, functools.partial(_store, activations, name)) for name in names if can_skip]
        with self._lens.attention_replay(layer) as replay:
            residual_above = self._stream(
                hooks=hooks, residual=self._residual, start_at_layer=layer, stop_at_layer=layer + 1
            )
        is_sum = can_skip and torch.equal(activations[names[0]] + activations[names[1]], residual_above)
        for branch in branches:
            if is_sum and _keeps_mlp(branch, layer):
                mid, mlp_out = (activations[name] for name in names)
                yield (
                    branch,
                    functools.partial(self._resumed_above, branch, layer, mid, mlp_out, residual_above),
                )
            else:
                yield branch, functools.partial(self._replayed, branch, replay)
        self._residual, self._layer = residual_above, layer + 1

    def _replayed(self, branch: Branch, replay: OwnedContext) -> Tensor:
        """Run a forward from the current layer on, with the stored results of that layer's attention."""
        with replay:
            return self._resumed(branch)

    def _resumed_above(
        self, branch: Branch, layer: int, mid: Tensor, mlp_out: Tensor, residual_above: Tensor
    ) -> Tensor:
        """Run a forward from `layer` + 1 on, after editing the MLP's output and the residual that leaves `layer`."""
        positions = self._positions()
        points = [edit.point for edit in branch.editor.edits]
        for number, point in enumerate(points):
            if point == in_layer(layer, "hook_mlp_out"):
                edited = branch.editor.apply(number, mlp_out, positions)
                mlp_out = mlp_out if edited is None else edited
                residual_above = mid + mlp_out
        for number, point in enumerate(points):
            if point == in_layer(layer, "hook_resid_post"):
                edited = branch.editor.apply(number, residual_above, positions)
                residual_above = residual_above if edited is None else edited
        higher_hooks = [
            hook
            for hook, edit in zip(branch.editor.hooks(self._positions), branch.editor.edits, strict=True)
            if edit.layer is None or edit.layer > layer
        ]
        return self._stream(hooks=higher_hooks, residual=residual_above, start_at_layer=layer + 1)
