"""What can be done to a run: one frozen object each, which holds no tensor and can be written down."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phaselens.errors import InputError
from phaselens.patching.passes import Hook
from phaselens.patching.points import Target

if TYPE_CHECKING:
    from torch import Tensor

#: Gives the clean run's activations of some hook points, by name.
Clean = Callable[[Sequence[str]], Mapping[str, "Tensor"]]


def ranges(numbers: Sequence[int]) -> str:
    """Numbers in short: `5`, `0–7`, `1, 4`.

    >>> ranges([0, 1, 2]), ranges([4]), ranges([1, 4])
    ('0–2', '4', '1, 4')
    """
    if len(numbers) > 2 and list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}–{numbers[-1]}"
    return ", ".join(map(str, numbers))


def numbered(noun: str, numbers: Sequence[int]) -> str:
    """Numbers behind their noun: `layer 5`, `layers 0–7`.

    >>> numbered("layer", [5]), numbered("layer", [0, 1, 2])
    ('layer 5', 'layers 0–2')
    """
    return f"{noun if len(numbers) == 1 else noun + 's'} {ranges(numbers)}"


@dataclass(frozen=True, repr=False)
class Edit:
    """One step of the stack. `code` is the call that makes it again."""

    code: str

    def hooks(self, clean: Clean) -> list[Hook]:
        """The hooks that make it; none where it is no edit of activations."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return str(self)


@dataclass(frozen=True, repr=False)
class Patch(Edit):
    """Activations of the corrupt run are replaced by those of the clean run."""

    target: Target

    def hooks(self, clean: Clean) -> list[Hook]:
        """A hook for each point."""
        values = clean(self.target.names)
        return [(name, _writer(self.target, name, values[name])) for name in self.target.names]

    def __str__(self) -> str:
        return f"patch {_where(self.target)} from the clean run"


@dataclass(frozen=True, repr=False)
class Ablate(Edit):
    """Activations are replaced by a number, or by their mean over the positions of the same run."""

    target: Target
    value: float | str = 0.0

    def hooks(self, clean: Clean) -> list[Hook]:
        """A hook for each point."""
        return [(name, _writer(self.target, name, self.value)) for name in self.target.names]

    def __str__(self) -> str:
        value = "their mean over positions" if self.value == "mean" else f"{self.value:g}"
        return f"ablate {_where(self.target)} to {value}"


@dataclass(frozen=True, repr=False)
class Rotation(Edit):
    """The rotation of some layers was nulled or restored; `before` is how it stood in each layer."""

    layers: tuple[int, ...]
    nulled: bool
    before: tuple[bool, ...]

    def hooks(self, clean: Clean) -> list[Hook]:
        """None: it is a switch of the model."""
        return []

    def __str__(self) -> str:
        return f"rotation of {numbered('layer', self.layers)} {'nulled' if self.nulled else 'restored'}"


def _writer(target: Target, name: str, value: Tensor | float | str) -> Callable[..., Tensor]:
    def write(old: Tensor, hook: Any) -> Tensor:
        new = old.mean(1, keepdim=True).expand_as(old) if isinstance(value, str) else value
        return target.write(name, old, new)

    return write


def _where(target: Target) -> str:
    names = target.names
    shown = names[0] if len(names) == 1 else f"{names[0]} … {names[-1].split('.')[1]} ({len(names)} layers)"
    heads = "" if target.heads is None else f", {numbered('head', target.heads)}"
    places = "all positions" if target.positions is None else numbered("position", target.positions)
    return f"{shown} at {places}{heads}"


def require_value(value: Any) -> float | str:
    """What an ablation may write: `"zero"`, `"mean"` or a number.

    Raises:
        InputError: for anything else.
    """
    if value == "zero":
        return 0.0
    if value == "mean" or (isinstance(value, int | float) and not isinstance(value, bool) and value == value):
        return value if isinstance(value, str) else float(value)
    raise InputError(f"value={value!r}: write 'zero', 'mean' or a number")
