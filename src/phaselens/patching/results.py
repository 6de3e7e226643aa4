"""What an experiment finds, as plain data that can print itself without a terminal."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from phaselens.errors import InputError, is_list_like, require_kind, short_form
from phaselens.patching.points import counted

if TYPE_CHECKING:
    import numpy as np

AXES = {"pos": ("layer", "pos"), "head": ("layer", "head"), "pos-head": ("layer", "pos", "head")}


class Shown:
    """What shows itself as it prints."""

    def __repr__(self) -> str:
        return str(self)


def empty(shape: tuple[int, ...]) -> np.ma.MaskedArray[Any, Any]:
    """Cells that were not measured, float64."""
    import numpy as np

    return np.ma.masked_array(np.zeros(shape), mask=True)


@dataclass(frozen=True, repr=False)
class Sweep(Shown):
    """The metric with one cell of the clean run at a time put into the corrupt run.

    `values` is a masked array, float64: [layer, pos], [layer, head] or [layer, pos, head], as `axes` says; `layers` are
    the layers of its rows. A cell that was not measured is masked. `base` is the metric of the run that is patched,
    `clean` that of the clean run.

    With `kind` `"attribution"` the values are `base` plus the gradient's estimate of each cell's effect. `set_aside`
    are the edits that did not fit the prompts and were not applied; `bos` is the prompts' BOS policy.
    """

    what: str
    by: str
    values: np.ma.MaskedArray[Any, Any]
    base: float
    clean: float
    metric: str
    layers: tuple[int, ...]
    clean_words: tuple[str, ...]
    corrupt_words: tuple[str, ...]
    n_heads: int
    kind: str = "patching"
    interrupted: bool = False
    set_aside: tuple[str, ...] = ()
    bos: str = field(kw_only=True)

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes of `values`."""
        return AXES[self.by]

    @property
    def effect(self) -> np.ma.MaskedArray[Any, Any]:
        """By how much each cell moves the metric: `values - base`."""
        return self.values - self.base

    @property
    def recovered(self) -> np.ma.MaskedArray[Any, Any]:
        """The same as a share of the way from `base` to `clean`: 0 did nothing, 1 restored the clean run's metric.

        Raises:
            InputError: where the two do not differ, so that there is no way to go.
        """
        if self.clean == self.base:
            raise InputError(
                f"{self.metric} is {self.base:g} in both runs; nothing can be recovered, look at `effect`"
            )
        return self.effect / (self.clean - self.base)

    @property
    def n_done(self) -> int:
        """How many cells were measured."""
        return int(self.values.count())

    def grid(self) -> np.ma.MaskedArray[Any, Any]:
        """`effect` with its axis of heads as wide as the queries'; a key or value head that is not there is masked."""
        effect = self.effect
        missing = self.n_heads - effect.shape[-1] if self.axes[-1] == "head" else 0
        if not missing:
            return effect
        wide = empty((*effect.shape[:-1], self.n_heads))
        wide[..., : effect.shape[-1]] = effect
        return wide

    def cells(self) -> Iterator[dict[str, Any]]:
        """Each cell as a row: its layer, position and head, `value` and `effect`; None where it was not measured."""
        import numpy as np

        effect = self.effect
        for place in np.ndindex(*self.values.shape):
            row = {axis: int(index) for axis, index in zip(self.axes, place, strict=True)}
            row["layer"] = self.layers[row["layer"]]
            there = self.values[place] is not np.ma.masked
            yield {
                **row,
                "value": float(self.values[place]) if there else None,
                "effect": float(effect[place]) if there else None,
            }

    def strongest(self, n: int = 5) -> list[dict[str, Any]]:
        """The `n` cells that move the metric most, either way."""
        measured = [cell for cell in self.cells() if cell["effect"] is not None]
        return sorted(measured, key=lambda cell: -abs(cell["effect"]))[:n]

    @property
    def title(self) -> str:
        """What was swept, over what, and how far it got."""
        over = " × ".join(self.axes)
        done = f", stopped after {self.n_done:,} of {self.values.size:,} cells" if self.interrupted else ""
        return f"{self.what}: {self.kind}, {over}{done}"

    def __str__(self) -> str:
        lines = [
            self.title,
            f"{self.metric}: corrupt {self.base:.4f}, clean {self.clean:.4f}; strongest cells:",
        ]
        for cell in self.strongest():
            where = ", ".join(f"{axis} {cell[axis]}" for axis in self.axes)
            word = f" {self.clean_words[cell['pos']]}" if "pos" in cell else ""
            lines.append(f"  {where}{word}: {cell['effect']:+.4f}")
        lines.append(f"bos: {self.bos}")
        lines += [f"set aside: {edit}" for edit in self.set_aside]
        return "\n".join(lines)


def stack(sweeps: Sequence[Sweep]) -> np.ma.MaskedArray[Any, Any]:
    """Effects of several sweeps of the same axes, [sweep, …]; cells that one of them does not have are masked.

    Raises:
        InputError: for sweeps of different axes or layers.
    """
    import numpy as np

    if not is_list_like(sweeps, Collection):
        raise InputError(f"stack: expected sweeps as a list of Sweeps, received {short_form(sweeps)}")
    for sweep in sweeps:
        require_kind("each of sweeps", sweep, Sweep, "from Experiment.sweep or attribution")
    if not sweeps:
        raise InputError("stack: no sweep was given")
    shapes = {(one.axes, one.layers, one.grid().shape) for one in sweeps}
    if len(shapes) > 1:
        raise InputError("stack: these sweeps differ in axes, layers or positions; sweep them alike")
    return np.ma.stack([one.grid() for one in sweeps])


@dataclass(frozen=True)
class Token:
    """A token that a model may say next, and how probable it holds it before and after the edits."""

    text: str
    before: float
    after: float


@dataclass(frozen=True, repr=False)
class Outcome(Shown):
    """What the edits did: next tokens, loss (nats a token) and metric before and after them.

    `top_before` and `top_after` are the most probable tokens at `pos`, most probable first. `clean` is the metric of
    the clean run. Loss and metric are None where there are none to measure; `reason` says why the metric is missing.
    `edits` were applied; those in `set_aside` did not fit the prompts. `bos` is the prompts' BOS policy.
    """

    run: str
    pos: int
    word: str
    top_before: tuple[Token, ...]
    top_after: tuple[Token, ...]
    loss: tuple[float, float] | None
    metric: str | None
    value: tuple[float, float] | None
    clean: float | None
    edits: tuple[str, ...]
    set_aside: tuple[str, ...] = ()
    reason: str = ""
    bos: str = field(kw_only=True)

    def __str__(self) -> str:
        head = f"{self.run}, next token after position {self.pos} {self.word}"
        after = f"after {counted(len(self.edits), 'edit')}"
        lines = [head, f"  {'before':>28}  {after:>28}"]
        for one, other in zip(self.top_before, self.top_after, strict=True):
            lines.append(f"  {one.text:>20} {one.before:7.4f}  {other.text:>20} {other.after:7.4f}")
        if self.loss is not None:
            lines.append(f"loss, nats a token: {self.loss[0]:.4f} → {self.loss[1]:.4f}")
        if self.value is not None:
            clean = "" if self.clean is None else f" (clean run: {self.clean:.4f})"
            lines.append(f"{self.metric}: {self.value[0]:.4f} → {self.value[1]:.4f}{clean}")
        lines += [f"no metric: {self.reason}"] if self.reason else []
        lines.append(f"bos: {self.bos}")
        lines += [f"set aside: {edit}" for edit in self.set_aside]
        return "\n".join(lines)


@dataclass(frozen=True, repr=False)
class Agreement(Shown):
    """How well attribution tells what patching finds, over the `n` cells that both have.

    Correlations are None where they do not exist: fewer than three cells, or one side without any variation;
    `reason` says which.
    """

    n: int
    pearson: float | None
    spearman: float | None
    reason: str = ""

    def __str__(self) -> str:
        if self.pearson is None or self.spearman is None:
            return f"attribution against patching: not to be said, {self.reason}"
        found = f"Pearson {self.pearson:.3f}, Spearman {self.spearman:.3f}"
        return f"attribution against patching, {self.n:,} cells: {found}"


def agreement(one: Sweep, other: Sweep) -> Agreement:
    """Correlation of two sweeps' effects over the cells that both have.

    Raises:
        InputError: where their cells are not the same.
    """
    import numpy as np
    from scipy import stats

    for name, sweep in (("one", one), ("other", other)):
        require_kind(name, sweep, Sweep, "from Experiment.sweep or attribution")
    same = ("what", "by", "layers", "metric", "base")
    differing = [name for name in same[:-1] if getattr(one, name) != getattr(other, name)]
    if differing or one.values.shape != other.values.shape:
        raise InputError(f"agreement: the two sweeps differ in {', '.join(differing) or 'their shape'}")
    both = ~(np.ma.getmaskarray(one.values) | np.ma.getmaskarray(other.values))
    x, y = one.effect.data[both], other.effect.data[both]
    n = int(both.sum())
    if n < 3:
        return Agreement(n, None, None, f"only {n} cells are known in both")
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return Agreement(n, None, None, "one of the two is the same everywhere")
    return Agreement(n, float(stats.pearsonr(x, y)[0]), float(stats.spearmanr(x, y)[0]))
