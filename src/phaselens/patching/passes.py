"""Forward passes with edits: whole passes, and passes one layer at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from phaselens.errors import InputError
from phaselens.lens.points import Hook, is_logits, layer_of
from phaselens.patching.targets import naming_keys, row_axis

if TYPE_CHECKING:
    from torch import Tensor

    from phaselens.lens import HookedTransformer


def capture_hook(name: str, activations: dict[str, Tensor], keys: tuple[int, ...] | None = None) -> Hook:
    """Return a hook that copies the activation at a point into `activations`; `keys` as in `naming_keys`."""

    def copy(value: Tensor, hook: object) -> None:
        activations[name] = value.detach().clone()

    return name, naming_keys(name, copy, keys)


def hooks_from_layer(hooks: Iterable[Hook], first_layer: int) -> list[Hook]:
    """Return the hooks that fire when a pass resumes at `first_layer`.

    Points outside of the layers are included: they fire after the layers, or not at all.
    """
    return [hook for hook in hooks if (layer := layer_of(hook[0])) is None or layer >= first_layer]


def hooks_in_layer(hooks: Iterable[Hook], layer: int | None) -> list[Hook]:
    """Return the hooks of one layer, or those outside of the layers for None."""
    return [hook for hook in hooks if layer_of(hook[0]) == layer]


class LayerwiseRun:
    """A forward pass of one text, one layer at a time: `residual` [1, pos, d_model] enters layer `layer`.

    `hooks` edit the pass. The hooks of `layer` have not acted on `residual` yet.
    """

    def __init__(self, lens: HookedTransformer, tokens: Tensor, hooks: Sequence[Hook] = ()) -> None:
        self.lens = lens
        self.hooks = hooks
        self.layer = 0
        self._tokens = tokens
        self._can_resume = lens.resume_problem is None
        # Stopping before a layer already fires the first hook point of that layer, so its hooks are left out.
        self.residual = lens.stream(tokens, hooks_in_layer(hooks, None), stop_at_layer=0)

    def advance(self, listeners: Sequence[Hook] = ()) -> None:
        """Run the current layer, with its edits and `listeners`, and move to the next one."""
        hooks = [*hooks_in_layer(self.hooks, self.layer), *listeners]
        if not self._can_resume:
            below = [
                hook for hook in self.hooks if (layer := layer_of(hook[0])) is None or layer < self.layer
            ]
            self.lens.stream(self._tokens, [*below, *hooks])
            self.layer += 1
            return
        next_residual = self.lens.stream(
            residual=self.residual, start_at_layer=self.layer, stop_at_layer=self.layer + 1, hooks=hooks
        )
        self.layer += 1
        if self.layer < self.lens.info.n_layers:
            self.residual = next_residual

    def resume(self, hooks: Sequence[Hook], batch_size: int) -> Tensor:
        """Return logits [batch, pos, d_vocab] of the pass from the current layer on, with `hooks` after the edits."""
        if not self._can_resume:
            return self.lens.stream(self._tokens.expand(batch_size, -1), [*self.hooks, *hooks], unembed=True)
        return self.lens.stream(
            residual=self.residual.expand(batch_size, -1, -1),
            start_at_layer=self.layer,
            hooks=[*hooks_from_layer(self.hooks, self.layer), *hooks],
            unembed=True,
        )


def capture_activations(
    lens: HookedTransformer, tokens: Tensor, names: Sequence[str], keys: tuple[int, ...] | None = None
) -> dict[str, Tensor]:
    """Return the activations [1, …] at these points in an unedited pass; `keys` as in `naming_keys`.

    Raises:
        InputError: for a point that does not fire, or that has no row for each position.
    """
    activations: dict[str, Tensor] = {}
    hooks = [capture_hook(name, activations, keys) for name in names]
    lens.stream(tokens, hooks, unembed=any(map(is_logits, names)))
    shapes = {name: list(activation.shape) for name, activation in activations.items()}
    _check_shapes(lens, shapes, names, tokens.shape[1])
    return activations


def require_rows(lens: HookedTransformer, tokens: Tensor, names: Sequence[str]) -> None:
    """Check that each point fires in an unedited pass and has a row for each position; keep no activations.

    Raises:
        InputError: for the first point that does not.
    """
    shapes: dict[str, list[int]] = {}

    def shape_hook(name: str) -> Hook:
        return name, lambda value, hook: shapes.update({name: list(value.shape)})

    lens.stream(tokens, [shape_hook(name) for name in names], unembed=any(map(is_logits, names)))
    _check_shapes(lens, shapes, names, tokens.shape[1])


def _check_shapes(
    lens: HookedTransformer, shapes: Mapping[str, list[int]], names: Sequence[str], n_tokens: int
) -> None:
    for name in names:
        if name not in shapes:
            raise InputError(
                f"{name} does not fire in a run of {lens.info.label}; `phaselens hooks` lists those that do"
            )
        shape = shapes[name]
        if len(shape) < 3 or shape[row_axis(name)] != n_tokens:
            raise InputError(
                f"{name} is {shape}, with no row for each of the {n_tokens} positions; choose another point"
            )
