"""Edits of a run: one frozen object per edit. It holds no tensor, and its `code` recreates it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import TYPE_CHECKING

from phaselens.errors import InputError, short_form
from phaselens.lens.points import Hook, HookFunction, is_attention, is_key_scores, is_matrix
from phaselens.patching.html import list_html, result_html
from phaselens.patching.targets import Target, naming_keys
from phaselens.patching.wording import count_phrase, number_phrase

if TYPE_CHECKING:
    from torch import Tensor

    from phaselens.lens.rows import Rows
    from phaselens.patching.prompts import Prompt

#: A function from hook names and keys to the clean run's activations at these points; the keys are those of
#: `hook_key_scores`, None for key 0.
CleanActivations = Callable[[Sequence[str], "tuple[int, ...] | None"], Mapping[str, "Tensor"]]


@dataclass(frozen=True, repr=False)
class Intervention:
    """One edit of the stack. `code` is the call that recreates it.

    `set_aside` is None, or the reason why the edit does not fit the current prompts and is not applied. `made_on` are
    the prompts (clean, corrupt) on which the edit was made.
    """

    code: str
    set_aside: str | None = field(default=None, kw_only=True)
    made_on: tuple[Prompt, Prompt | None] | None = field(default=None, kw_only=True, compare=False)

    def fit_to(self, clean: Prompt, corrupt: Prompt | None) -> Intervention:
        """Return the edit on these prompts, set aside if it does not fit them."""
        return replace(self._moved_to(clean, corrupt), set_aside=self._misfit_reason(clean, corrupt))

    def _moved_to(self, clean: Prompt, corrupt: Prompt | None) -> Intervention:
        return self

    def _misfit_reason(self, clean: Prompt, corrupt: Prompt | None) -> str | None:
        return None

    def hooks(self, clean: CleanActivations, rows: Rows) -> list[Hook]:
        """Return the hooks that apply the edit, at the absolute positions of `rows`; none if it edits no activation."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return str(self)


@dataclass(frozen=True, repr=False)
class _TargetedIntervention(Intervention):
    """An edit of the activations in a target, which needs prompts that are long enough for it."""

    target: Target

    def _moved_to(self, clean: Prompt, corrupt: Prompt | None) -> Intervention:
        return replace(self, target=self.target.for_length(len(clean)))

    def _misfit_reason(self, clean: Prompt, corrupt: Prompt | None) -> str | None:
        return (
            None if self.target.fits(len(clean)) else f"the prompts have {count_phrase(len(clean), 'token')}"
        )


@dataclass(frozen=True, repr=False)
class Patch(_TargetedIntervention):
    """Replace activations of the corrupt run by those of the clean run."""

    def _misfit_reason(self, clean: Prompt, corrupt: Prompt | None) -> str | None:
        return "there is no corrupt prompt" if corrupt is None else super()._misfit_reason(clean, corrupt)

    def hooks(self, clean: CleanActivations, rows: Rows) -> list[Hook]:
        """Return one hook per point."""
        values = clean(self.target.names, self.target.keys)
        return [(name, _write_hook(self.target, name, values[name], rows)) for name in self.target.names]

    def __str__(self) -> str:
        return f"patch {_describe(self.target)} from the clean run"


@dataclass(frozen=True, repr=False)
class Ablate(_TargetedIntervention):
    """Replace activations by a number, or by their mean over the positions of the same run."""

    value: float | str = 0.0

    def hooks(self, clean: CleanActivations, rows: Rows) -> list[Hook]:
        """Return one hook per point."""
        return [(name, _write_hook(self.target, name, self.value, rows)) for name in self.target.names]

    def __str__(self) -> str:
        value = "their mean over positions" if self.value == "mean" else f"{self.value:g}"
        return f"ablate {_describe(self.target)} to {value}"


@dataclass(frozen=True, repr=False)
class SetRotation(Intervention):
    """The rotation of `layers` was nulled or restored. `changed` are the layers whose rotation changed."""

    layers: tuple[int, ...]
    nulled: bool
    changed: tuple[int, ...]

    def hooks(self, clean: CleanActivations, rows: Rows) -> list[Hook]:
        """Return no hooks: the rotation is a switch of the model."""
        return []

    def __str__(self) -> str:
        return f"rotation of {number_phrase('layer', self.layers)} {'nulled' if self.nulled else 'restored'}"


def _write_hook(target: Target, name: str, value: Tensor | float | str, rows: Rows) -> HookFunction:
    """Return the hook function that writes `value` to the target's part of the activation at a point."""

    def write(activation: Tensor, hook: object) -> Tensor:
        import torch

        n_past, starts = (rows.n_past, rows.starts()) if rows.running else (0, [0])
        if isinstance(value, str) and n_past:
            raise InputError(
                f"{name}: a mean over positions needs the whole text in one pass; run without a cache "
                "(use_past_kv_cache=False)"
            )
        if len(starts) == 1:
            return write_text(activation, starts[0], n_past)
        return torch.cat([write_text(activation[i : i + 1], start, n_past) for i, start in enumerate(starts)])

    def write_text(activation: Tensor, start: int, n_past: int) -> Tensor:
        n_pads = max(0, n_past - start)
        if isinstance(value, str):
            mean = activation[:, n_pads:].mean(1, keepdim=True)
            rows_of_mean = mean.expand(-1, activation.shape[1] - n_pads, *activation.shape[2:])
            return target.write(name, activation, rows_of_mean, start)
        return target.write(name, activation, value, start, n_pads)

    return naming_keys(name, write, target.keys)


def _describe(target: Target) -> str:
    names = target.names
    points = names[0] if len(names) == 1 else f"{names[0]} … {names[-1].split('.')[1]} ({len(names)} layers)"
    heads = "" if target.heads is None else f", {number_phrase('head', target.heads)}"
    positions = "all positions" if target.positions is None else number_phrase("position", target.positions)
    keys = "" if target.keys is None else f", {number_phrase('key', target.keys)}"
    return f"{points} at {positions}{heads}{keys}"


def parse_ablation_value(value: object, names: Sequence[str]) -> float | str:
    """Return the value that an ablation writes: a number (`"zero"` is 0), or `"mean"`.

    For the score of a key, `"zero"` is −inf: the key's attention becomes 0.

    Raises:
        InputError: for anything else, infinite numbers included (but −inf for the score of a key), and for the mean of
            scores or attention.
    """
    writes_scores = any(map(is_key_scores, names))
    if isinstance(value, str) and value == "mean":
        _require_no_matrix(names)
        return value
    if isinstance(value, str) and value == "zero":
        return -math.inf if writes_scores else 0.0
    if isinstance(value, Real) and not isinstance(value, bool):
        number = float(value)
        if math.isfinite(number) or (writes_scores and number == -math.inf):
            return number
    raise InputError(f"value={short_form(value)}: give 'zero', 'mean' or a number")


def _require_no_matrix(names: Sequence[str]) -> None:
    """Raise InputError for scores or attention: no mean over causal rows could replace one of them."""
    for name in filter(is_key_scores, names):
        raise InputError(
            f"{name}: value='mean': a score counts relative to the others of its row, so a mean over rows removes "
            "nothing; give 'zero', which removes the key, or a number"
        )
    for name in filter(is_matrix, names):
        reason = (
            "lets a query attend to later keys"
            if is_attention(name)
            else "is -inf for every key that is hidden from one of them"
        )
        raise InputError(
            f"{name}: value='mean': the mean of its rows over queries {reason}; give 'zero' or a number, or ablate "
            "hook_z or hook_v of the layer to their mean"
        )


class Stack(tuple[Intervention, ...]):
    """Edits in the order in which they were made; printed as a numbered list."""

    __slots__ = ()

    @property
    def applied(self) -> tuple[Intervention, ...]:
        """The edits that fit the current prompts."""
        return tuple(edit for edit in self if edit.set_aside is None)

    @property
    def set_aside(self) -> tuple[str, ...]:
        """The edits that are set aside, each with its number and the reason."""
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

    def _repr_html_(self) -> str:
        return (
            list_html([line.partition(". ")[2] for line in str(self).split("\n")])
            if self
            else result_html("no edits", None)
        )
