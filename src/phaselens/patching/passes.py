"""Forward passes with edits: whole ones, and one layer at a time from the residual that enters it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from phaselens.errors import InputError
from phaselens.patching.points import layer_of, row_axis

if TYPE_CHECKING:
    from torch import Tensor

    from phaselens.lens import HookedTransformer

Hook = tuple[str, Callable[..., Any]]


def keep(into: dict[str, Tensor], name: str) -> Hook:
    """A hook that copies the activation of that name."""

    def copy(value: Tensor, hook: Any) -> None:
        into[name] = value.detach().clone()

    return name, copy


def from_layer(hooks: Iterable[Hook], layer: int) -> list[Hook]:
    """Those that fire when a pass resumes at `layer`. (What is in no layer fires there too, or never.)"""
    return [one for one in hooks if (at := layer_of(one[0])) is None or at >= layer]


def in_layer(hooks: Iterable[Hook], layer: int) -> list[Hook]:
    """Those of one layer."""
    return [one for one in hooks if layer_of(one[0]) == layer]


class Walk:
    """The residual stream of one text, one layer after the other: `residual` [1, pos, d_model] enters `layer`.

    `hooks` edit the run. Those of a layer have not acted on `residual` before that layer runs.
    """

    def __init__(self, lens: HookedTransformer, tokens: Tensor, hooks: Sequence[Hook] = ()) -> None:
        self.lens = lens
        self.hooks = hooks
        self.layer = 0
        # Stopping before a layer fires that layer's first hook point already, so its hooks are left out.
        below = [one for one in hooks if layer_of(one[0]) is None]
        self.residual = lens.stream(tokens, below, stop_at_layer=0)

    def advance(self, listeners: Sequence[Hook] = ()) -> None:
        """Run the layer, `listeners` beside its edits, and stand before the next one."""
        hooks = [*in_layer(self.hooks, self.layer), *listeners]
        above = self.lens.stream(
            residual=self.residual, start_at_layer=self.layer, stop_at_layer=self.layer + 1, hooks=hooks
        )
        self.layer += 1
        if self.layer < self.lens.info.n_layers:
            self.residual = above

    def resume(self, extra: Sequence[Hook], batch: int) -> Tensor:
        """Logits [batch, pos, d_vocab] of the run from here on, `extra` hooks after the edits."""
        return self.lens.stream(
            residual=self.residual.expand(batch, -1, -1),
            start_at_layer=self.layer,
            hooks=[*from_layer(self.hooks, self.layer), *extra],
            unembed=True,
        )


def captured(lens: HookedTransformer, tokens: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """The activations of those names in a plain run, [1, …].

    Raises:
        InputError: for one that does not fire, or that has no row for each position.
    """
    activations: dict[str, Tensor] = {}
    lens.stream(tokens, [keep(activations, name) for name in names], unembed=any(map(_late, names)))
    shapes = {name: list(activation.shape) for name, activation in activations.items()}
    _check_shapes(lens, shapes, names, tokens.shape[1])
    return activations


def require_rows(lens: HookedTransformer, tokens: Tensor, names: Sequence[str]) -> None:
    """Check that each of those points fires in a plain run and has a row for each position; keeps no activations.

    Raises:
        InputError: for the first one that does not.
    """
    shapes: dict[str, list[int]] = {}

    def note(name: str) -> Hook:
        return name, lambda value, hook: shapes.update({name: list(value.shape)})

    lens.stream(tokens, [note(name) for name in names], unembed=any(map(_late, names)))
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


def _late(name: str) -> bool:
    return name.startswith("unembed")


@contextmanager
def rotation_as(lens: HookedTransformer, nulled: Sequence[bool]) -> Iterator[None]:
    """Inside, the rotation of each layer is nulled or not."""
    before = rotation(lens)
    set_rotation(lens, nulled)
    try:
        yield
    finally:
        set_rotation(lens, before)


def rotation(lens: HookedTransformer) -> tuple[bool, ...]:
    """For each layer, whether its rotation is nulled."""
    from phaselens.lens.components import each_attention

    return tuple(attention.nulled for attention in each_attention(lens))


def set_rotation(lens: HookedTransformer, nulled: Sequence[bool]) -> None:
    """Null the rotation of each layer, or restore it."""
    from phaselens.lens.components import each_attention

    for attention, null in zip(each_attention(lens), nulled, strict=True):
        attention.nulled = null
