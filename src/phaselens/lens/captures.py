"""Copies of a forward's activations."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from phaselens.lens.points import HookFunction, in_layer

if TYPE_CHECKING:
    from phaselens.lens.bridge import HookedTransformer

Key = TypeVar("Key", bound=Hashable)


def capture(
    lens: HookedTransformer, tokens: Tensor, names: Mapping[Key, str], **options: Any
) -> tuple[Tensor, dict[Key, Tensor]]:
    """Run one forward; return its output, and a copy of each named activation under its key."""
    activations: dict[Key, Tensor] = {}
    output = lens.stream(tokens, [(name, keeper(activations, key)) for key, name in names.items()], **options)
    return output, activations


def keeper(activations: dict[Key, Tensor], key: Key) -> HookFunction:
    """Return a hook function that keeps a copy of its activation under `key`."""

    def keep(value: Tensor, hook: object) -> None:
        activations[key] = value.detach().clone()

    return keep


def per_layer(lens: HookedTransformer, point: str) -> dict[Any, str]:
    """Return the names of a point by layer, of the layers that have it."""
    names = {layer: in_layer(layer, point) for layer in range(lens.info.n_layers)}
    return {layer: name for layer, name in names.items() if lens.find_hook(name) is not None}
