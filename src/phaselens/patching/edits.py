"""What can be done to a run: one frozen object each, which holds no tensor and can be written down."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from phaselens.errors import InputError
from phaselens.patching.passes import Hook
from phaselens.patching.points import Places, Target, brief, counted, is_matrix

if TYPE_CHECKING:
    from torch import Tensor

    from phaselens.lens.rows import Rows
    from phaselens.patching.prompts import Prompt

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
    """One step of the stack. `code` is the call that makes it again.

    `set_aside` says why the edit does not fit the present prompts and is not applied, or is None. `made_on` is the pair
    of prompts (clean, corrupt) that it was made on.
    """

    code: str
    set_aside: str | None = field(default=None, kw_only=True)
    made_on: tuple[Prompt, Prompt | None] | None = field(default=None, kw_only=True, compare=False)

    def fitted(self, clean: Prompt, corrupt: Prompt | None) -> Edit:
        """The same edit on these prompts, set aside where it does not fit them."""
        return replace(self._on(clean, corrupt), set_aside=self._misfit(clean, corrupt))

    def _on(self, clean: Prompt, corrupt: Prompt | None) -> Edit:
        return self

    def _misfit(self, clean: Prompt, corrupt: Prompt | None) -> str | None:
        return None

    def hooks(self, clean: Clean, rows: Rows) -> list[Hook]:
        """The hooks that make it, at absolute positions, which `rows` knows; none where it edits no activations."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return str(self)


@dataclass(frozen=True, repr=False)
class _OfTarget(Edit):
    """An edit of activations at some places, which prompts may be too short for."""

    target: Target

    def _on(self, clean: Prompt, corrupt: Prompt | None) -> Edit:
        return replace(self, target=self.target.on(len(clean)))

    def _misfit(self, clean: Prompt, corrupt: Prompt | None) -> str | None:
        return None if self.target.fits(len(clean)) else f"the prompts have {counted(len(clean), 'token')}"


@dataclass(frozen=True, repr=False)
class Patch(_OfTarget):
    """Activations of the corrupt run are replaced by those of the clean run."""

    def _misfit(self, clean: Prompt, corrupt: Prompt | None) -> str | None:
        return "there is no corrupt prompt" if corrupt is None else super()._misfit(clean, corrupt)

    def hooks(self, clean: Clean, rows: Rows) -> list[Hook]:
        """A hook for each point."""
        values = clean(self.target.names)
        return [(name, _writer(self.target, name, values[name], rows)) for name in self.target.names]

    def __str__(self) -> str:
        return f"patch {_where(self.target)} from the clean run"


@dataclass(frozen=True, repr=False)
class Ablate(_OfTarget):
    """Activations are replaced by a number, or by their mean over the positions of the same run."""

    value: float | str = 0.0

    def hooks(self, clean: Clean, rows: Rows) -> list[Hook]:
        """A hook for each point."""
        return [(name, _writer(self.target, name, self.value, rows)) for name in self.target.names]

    def __str__(self) -> str:
        value = "their mean over positions" if self.value == "mean" else f"{self.value:g}"
        return f"ablate {_where(self.target)} to {value}"


@dataclass(frozen=True, repr=False)
class Rotation(Edit):
    """The rotation of some layers was nulled or restored; `before` is how it stood in each layer."""

    layers: tuple[int, ...]
    nulled: bool
    before: tuple[bool, ...]

    def hooks(self, clean: Clean, rows: Rows) -> list[Hook]:
        """None: it is a switch of the model."""
        return []

    def __str__(self) -> str:
        return f"rotation of {numbered('layer', self.layers)} {'nulled' if self.nulled else 'restored'}"


def _writer(target: Target, name: str, value: Tensor | float | str, rows: Rows) -> Callable[..., Tensor]:
    def write(old: Tensor, hook: Any) -> Tensor:
        import torch

        n_past, starts = (rows.n_past, rows.starts()) if rows.running else (0, [0])
        if isinstance(value, str) and n_past:
            raise InputError(
                f"{name}: a mean over positions needs the whole text in one pass; run without a cache "
                "(use_past_kv_cache=False)"
            )
        if len(starts) == 1:
            return write_text(old, starts[0], n_past)
        return torch.cat([write_text(old[i : i + 1], start, n_past) for i, start in enumerate(starts)])

    def write_text(old: Tensor, start: int, n_past: int) -> Tensor:
        n_pads = max(0, n_past - start)
        if isinstance(value, str):
            mean = old[:, n_pads:].mean(1, keepdim=True)
            return target.write(name, old, mean.expand(-1, old.shape[1] - n_pads, *old.shape[2:]), start)
        return target.write(name, old, value, start, n_pads)

    return write


def _where(target: Target) -> str:
    names = target.names
    shown = names[0] if len(names) == 1 else f"{names[0]} … {names[-1].split('.')[1]} ({len(names)} layers)"
    heads = "" if target.heads is None else f", {numbered('head', target.heads)}"
    places = "all positions" if target.positions is None else numbered("position", target.positions)
    return f"{shown} at {places}{heads}"


def require_value(value: Any, names: Sequence[str]) -> float | str:
    """What an ablation may write: `"zero"`, `"mean"` or a number.

    Raises:
        InputError: for anything else, infinite numbers among it, and for the mean of a matrix.
    """
    if isinstance(value, str) and value == "mean":
        _require_mean(names)
        return value
    if isinstance(value, str) and value == "zero":
        return 0.0
    if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    raise InputError(f"value={brief(value)}: write 'zero', 'mean' or a number")


def _require_mean(names: Sequence[str]) -> None:
    """InputError for a matrix of queries and keys: causal rows have no mean that could stand in for one of them."""
    for name in filter(is_matrix, names):
        reason = (
            "lets a query attend to later keys"
            if name.endswith("hook_pattern")
            else "is -inf for every key that is hidden from one of them"
        )
        raise InputError(
            f"{name}: value='mean': the mean of its rows over queries {reason}; write 'zero' or a number, or ablate "
            "hook_z or hook_v of the layer to their mean"
        )


def call(name: str, /, *positional: Any, **arguments: Any) -> str:
    """A call as source, for scripts.

    >>> call("patch", "blocks.1.hook_z", pos=(3, -1), head=0)
    "patch('blocks.1.hook_z', pos=[3, -1], head=0)"
    """
    shown = [_source(value) for value in positional]
    shown += [f"{key}={_source(value)}" for key, value in arguments.items()]
    return f"{name}({', '.join(shown)})"


def edit_call(verb: str, point: str | None, **arguments: Any) -> str:
    """The call that makes an edit again, without the arguments that have their defaults."""
    return call(verb, *(() if point is None else (point,)), **unusual(**arguments))


def unusual(**arguments: Any) -> dict[str, Any]:
    """The arguments of an edit or a sweep that do not have their defaults."""
    usual = {"pos": "all", "value": "zero"}
    return {
        name: value
        for name, value in arguments.items()
        if value is not None and not (isinstance(value, str) and value == usual.get(name))
    }


def _source(value: Any) -> str:
    """A value as source: numbers of any library as Python's own, and what can be iterated as a list."""
    if value is None or isinstance(value, bool | str | range):
        return repr(value)
    if isinstance(value, Integral):
        return repr(int(value))
    if isinstance(value, Real):
        return repr(float(value)) if math.isfinite(value) else f"float('{float(value)}')"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_source(key)}: {_source(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, Iterable):
        return f"[{', '.join(map(_source, value))}]"
    return repr(value)


def kept(given: Places) -> Places:
    """What can be read only once, as a list."""
    return list(given) if isinstance(given, Iterator) else given


class Stack(tuple[Edit, ...]):
    """Edits in the order they were made; printed as a numbered list."""

    __slots__ = ()

    @property
    def applied(self) -> tuple[Edit, ...]:
        """Those that fit the present prompts."""
        return tuple(edit for edit in self if edit.set_aside is None)

    @property
    def set_aside(self) -> tuple[str, ...]:
        """What is set aside, each edit with its number and the reason."""
        return tuple(
            f"{number}. {edit} ({edit.set_aside})"
            for number, edit in enumerate(self, start=1)
            if edit.set_aside is not None
        )

    def __str__(self) -> str:
        lines = [
            f"{number}. {edit}" + ("" if edit.set_aside is None else f" – set aside: {edit.set_aside}")
            for number, edit in enumerate(self, start=1)
        ]
        return "\n".join(lines) or "no edits"

    __repr__ = __str__
