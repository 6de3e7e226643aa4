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

FROM_TOKENS = -1


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
        if start == FROM_TOKENS:
            for branch in starts[start]:
                branch.guard(lambda branch=branch: branch.take(climber.from_tokens(branch)))  # type: ignore[misc]
            continue
        climber.to(start)
        late = [branch for branch in starts[start] if _after_mlp(branch, start)]
        for branch in starts[start]:
            if branch not in late:
                branch.guard(lambda branch=branch: branch.take(climber.resumed(branch)))  # type: ignore[misc]
        if late:
            for branch, run in climber.past_mlp(start, late):
                branch.guard(lambda branch=branch, run=run: branch.take(run()))  # type: ignore[misc]
    return climber.top()


def _after_mlp(branch: Branch, layer: int) -> bool:
    """Whether its lowest layer is changed at nothing but what the MLP adds, so that the layer need not run again."""
    names = {edit.point for edit in branch.editor.edits if edit.layer == layer}
    return bool(names) and names <= {f"blocks.{layer}.hook_mlp_out", f"blocks.{layer}.hook_resid_post"}


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

    def to(self, layer: int) -> Tensor:
        """The residual that enters `layer`."""
        if self._residual is None:
            self._residual = self._lens.stream(self._batch.tokens, stop_at_layer=layer)
        elif layer > self._layer:
            self._residual = self._lens.stream(
                residual=self._residual, start_at_layer=self._layer, stop_at_layer=layer
            )
        self._layer = layer
        return self._residual

    def top(self) -> Tensor:
        """The unedited model's final norm output."""
        residual = self.to(self._lens.info.n_layers)
        return self._lens.stream(residual=residual, start_at_layer=self._lens.info.n_layers)

    def from_tokens(self, branch: Branch) -> Tensor:
        """A whole forward under the branch's edits."""
        return self._lens.stream(self._batch.tokens, branch.editor.hooks(self._positions))

    def resumed(self, branch: Branch) -> Tensor:
        """The forward under the branch's edits from the present layer on."""
        hooks = branch.editor.hooks(self._positions)
        return self._lens.stream(hooks=hooks, residual=self._residual, start_at_layer=self._layer)

    def past_mlp(
        self, layer: int, branches: Sequence[Branch]
    ) -> Iterator[tuple[Branch, Callable[[], Tensor]]]:
        """The branches that change only what the MLP of `layer` adds: from the layer above, where the sum that the
        model makes of the residual and the MLP's output is exactly ours; else from this layer."""
        import torch

        names = [f"blocks.{layer}.{point}" for point in ("hook_resid_mid", "hook_mlp_out", "hook_resid_post")]
        if any(self._lens.find_hook(name) is None for name in names):
            yield from ((branch, functools.partial(self.resumed, branch)) for branch in branches)
            return
        seen: dict[str, Tensor] = {}
        catch = [(name, functools.partial(_keep, seen, name)) for name in names]
        above = self._lens.stream(
            hooks=catch, residual=self._residual, start_at_layer=layer, stop_at_layer=layer + 1
        )
        mid, added, _ = (seen[name] for name in names)
        if not torch.equal(mid + added, above):
            yield from ((branch, functools.partial(self.resumed, branch)) for branch in branches)
            return
        self._residual, self._layer = above, layer + 1
        for branch in branches:
            yield branch, functools.partial(self._edited, branch, layer, mid, added, above)

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
        return self._lens.stream(hooks=higher, residual=above, start_at_layer=layer + 1)
