"""Results of an experiment: plain data that prints itself without a terminal."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from phaselens.errors import InputError, is_list_like, require_kind, short_form
from phaselens.patching.html import result_html, sweep_html
from phaselens.patching.prompts import token_text
from phaselens.patching.wording import count_phrase, number_text
from phaselens.plugin import Column, Table, TableSpec

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from phaselens.lens import HookedTransformer

#: Axes of a sweep's values, by the name of `by`.
AXES = {"pos": ("layer", "pos"), "head": ("layer", "head"), "pos-head": ("layer", "pos", "head")}


class TextResult:
    """Base class of results whose repr is the text that they print, and which a notebook shows as a table."""

    def __repr__(self) -> str:
        return str(self)

    def to_table(self) -> Table | None:
        """Return the result's numbers as a table, or None if it has no rows."""
        return None

    def _repr_html_(self) -> str:
        """Return the title that `str` begins with, the table, and the notes that `str` ends with."""
        lines = str(self).split("\n")
        notes = [line for line in lines[1:] if line.startswith(_NOTE_STARTS)]
        return result_html(lines[0], self.to_table(), notes)


#: What the lines begin with that a result prints below its numbers.
_NOTE_STARTS = ("bos: ", "note: ", "set aside: ")
#: Columns of the axes of a sweep.
_AXIS_COLUMNS = {
    "layer": (Column("layer", int, "index", "0-based"),),
    "pos": (
        Column("pos", int, "index", "position, 0-based"),
        Column("clean_token", str, None, "the clean prompt's token there"),
        Column("corrupt_token", str, None, "the corrupt prompt's token there"),
    ),
    "head": (Column("head", int, "index", "0-based"),),
}


def unmeasured(shape: tuple[int, ...]) -> np.ma.MaskedArray[Any, Any]:
    """Return a float64 array of this shape with every cell masked."""
    import numpy as np

    return np.ma.masked_array(np.zeros(shape), mask=True)


@dataclass(frozen=True, repr=False)
class Sweep(TextResult):
    """The metric with one cell of the clean run at a time put into the corrupt run.

    `values` is a masked array, float64: [layer, pos], [layer, head] or [layer, pos, head], as `axes` says; `layers` are
    the layers of its rows. A cell that was not measured is masked. `base` is the metric of the corrupt run with its
    edits, `clean` that of the clean run.

    With `kind` `"attribution"` the values are `base` plus the gradient's estimate of each cell's effect. `set_aside`
    are the edits that did not fit the prompts and were not applied; `bos` is the prompts' BOS policy, and `model` the
    model's label.
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
    model: str = field(default="", kw_only=True)

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes of `values`."""
        return AXES[self.by]

    @property
    def effect(self) -> np.ma.MaskedArray[Any, Any]:
        """The change of the metric by each cell: `values - base`."""
        return self.values - self.base

    @property
    def recovered(self) -> np.ma.MaskedArray[Any, Any]:
        """`effect` as a fraction of the difference between `base` and `clean`: 1 restores the clean run's metric.

        Raises:
            InputError: where `base` and `clean` are equal, so that the fraction is undefined.
        """
        if self.clean == self.base:
            raise InputError(
                f"{self.metric} is {self.base:g} in both runs, so that nothing can be recovered; use `effect`"
            )
        return self.effect / (self.clean - self.base)

    @property
    def n_done(self) -> int:
        """The number of cells that were measured."""
        return int(self.values.count())

    def grid(self) -> np.ma.MaskedArray[Any, Any]:
        """Return `effect` with as many heads as queries have; heads that keys and values lack are masked."""
        effect = self.effect
        n_missing = self.n_heads - effect.shape[-1] if self.axes[-1] == "head" else 0
        if not n_missing:
            return effect
        widened = unmeasured((*effect.shape[:-1], self.n_heads))
        widened[..., : effect.shape[-1]] = effect
        return widened

    def cells(self) -> Iterator[dict[str, Any]]:
        """Yield each cell as a row: layer, position and head, `value` and `effect`; None where it was not measured."""
        import numpy as np

        effect = self.effect
        for index in np.ndindex(*self.values.shape):
            row = {axis: int(number) for axis, number in zip(self.axes, index, strict=True)}
            row["layer"] = self.layers[row["layer"]]
            is_measured = self.values[index] is not np.ma.masked
            yield {
                **row,
                "value": float(self.values[index]) if is_measured else None,
                "effect": float(effect[index]) if is_measured else None,
            }

    def to_table(self) -> Table:
        """Return all cells as a table: the axes (a position with both prompts' tokens), `value` and `effect`.

        `to_arrow` and `to_pandas` convert it; a cell that was not measured is missing.
        """
        columns = [column for axis in self.axes for column in _AXIS_COLUMNS[axis]]
        unit = f"of {self.metric}"
        columns += [
            Column("value", float, unit, "the metric with this cell of the clean run in the corrupt run"),
            Column("effect", float, unit, "value − the metric of the corrupt run"),
        ]
        spec = TableSpec(self.what, tuple(columns), self.title)
        words = {"clean_token": self.clean_words, "corrupt_token": self.corrupt_words}
        return spec.build(
            [
                words[column.name][cell["pos"]] if column.name in words else cell[column.name]
                for column in columns
            ]
            for cell in self.cells()
        )

    def _repr_html_(self) -> str:
        return sweep_html(self, [f"bos: {self.bos}", *(f"set aside: {edit}" for edit in self.set_aside)])

    def strongest(self, n: int = 5) -> list[dict[str, Any]]:
        """Return the `n` cells with the largest effect, by absolute value."""
        measured = [cell for cell in self.cells() if cell["effect"] is not None]
        return sorted(measured, key=lambda cell: -abs(cell["effect"]))[:n]

    @property
    def title(self) -> str:
        """The kind of activation, the axes, and where an interrupted sweep stopped."""
        axes = " × ".join(self.axes)
        progress = (
            f", stopped after {self.n_done:,} of {self.values.size:,} cells" if self.interrupted else ""
        )
        return f"{self.what}: {self.kind}, {axes}{progress}"

    def __str__(self) -> str:
        lines = [
            self.title,
            f"{self.metric}: corrupt {number_text(self.base)}, clean {number_text(self.clean)}; strongest cells:",
        ]
        for cell in self.strongest():
            indices = ", ".join(f"{axis} {cell[axis]}" for axis in self.axes)
            word = f" {self.clean_words[cell['pos']]}" if "pos" in cell else ""
            lines.append(f"  {indices}{word}: {number_text(cell['effect'], signed=True)}")
        lines.append(f"bos: {self.bos}")
        lines += [f"set aside: {edit}" for edit in self.set_aside]
        return "\n".join(lines)


def stack(sweeps: Sequence[Sweep]) -> np.ma.MaskedArray[Any, Any]:
    """Stack the effects of several sweeps of the same axes, [sweep, …]; cells that a sweep lacks are masked.

    Raises:
        InputError: for sweeps of different axes or layers.
    """
    import numpy as np

    if not is_list_like(sweeps, Collection):
        raise InputError(f"stack: expected sweeps as a list of Sweeps, received {short_form(sweeps)}")
    for sweep in sweeps:
        require_kind("each of sweeps", sweep, Sweep, "from Experiment.sweep or attribution")
    if not sweeps:
        raise InputError("stack: the list of sweeps is empty")
    shapes = {(sweep.axes, sweep.layers, sweep.grid().shape) for sweep in sweeps}
    if len(shapes) > 1:
        raise InputError(
            "stack: these sweeps differ in axes, layers or positions; give sweeps that agree in all three"
        )
    return np.ma.stack([sweep.grid() for sweep in sweeps])


@dataclass(frozen=True)
class Token:
    """A possible next token, and its probability before and after the edits."""

    text: str
    before: float
    after: float


def likeliest_tokens(
    lens: HookedTransformer, logits: tuple[Tensor, Tensor], top: int
) -> list[tuple[Token, ...]]:
    """Return the `top` most probable tokens before and after the edits, from the logits [d_vocab] of both; every token
    has its probability in both."""
    probabilities = [row.double().softmax(-1) for row in logits]
    return [
        tuple(
            Token(token_text(lens, token), *(float(row[token]) for row in probabilities))
            for token in ranking.topk(top).indices.tolist()
        )
        for ranking in probabilities
    ]


_TOKENS_TABLE = TableSpec(
    "tokens",
    (
        Column("rank", int, None, "1 is the most probable"),
        Column("before", str, None, "the token at this rank without the edits"),
        Column("p_before", float, "probability", "its probability without the edits"),
        Column("after", str, None, "the token at this rank with the edits"),
        Column("p_after", float, "probability", "its probability with the edits"),
    ),
    "The most probable next tokens.",
)


@dataclass(frozen=True, repr=False)
class PromptResult(TextResult):
    """Next tokens, loss (nats per token) and metric of a prompt, before and after the edits.

    `top_before` and `top_after` are the most probable tokens at `pos`, most probable first. `clean` is the metric of
    the clean run. `loss` and `value` are None where they are missing; `reason` says why the metric is missing.
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

    def to_table(self) -> Table:
        """Return the most probable tokens before and after the edits, with their probabilities."""
        pairs = zip(self.top_before, self.top_after, strict=True)
        return _TOKENS_TABLE.build(
            (rank, before.text, before.before, after.text, after.after)
            for rank, (before, after) in enumerate(pairs, start=1)
        )

    def _repr_html_(self) -> str:
        lines = str(self).split("\n")
        return result_html(lines[0], self.to_table(), lines[2 + len(self.top_before) :])

    def __str__(self) -> str:
        title = f"{self.run}, next token after position {self.pos} {self.word}"
        after = f"after {count_phrase(len(self.edits), 'edit')}"
        lines = [title, f"  {'before':>28}  {after:>28}"]
        for unedited, edited in zip(self.top_before, self.top_after, strict=True):
            before_edits, after_edits = number_text(unedited.before), number_text(edited.after)
            lines.append(f"  {unedited.text:>20} {before_edits:>7}  {edited.text:>20} {after_edits:>7}")
        if self.loss is not None:
            lines.append(f"loss, nats per token: {' → '.join(map(number_text, self.loss))}")
        if self.value is not None:
            clean = "" if self.clean is None else f" (clean run: {number_text(self.clean)})"
            lines.append(f"{self.metric}: {' → '.join(map(number_text, self.value))}{clean}")
        lines += [f"no metric: {self.reason}"] if self.reason else []
        lines.append(f"bos: {self.bos}")
        lines += [f"set aside: {edit}" for edit in self.set_aside]
        return "\n".join(lines)


@dataclass(frozen=True, repr=False)
class Agreement(TextResult):
    """Correlations between attribution and patching, over the `n` cells that both have.

    A correlation is None where it is undefined, with fewer than three cells or where one side is constant; `reason`
    says which.
    """

    n: int
    pearson: float | None
    spearman: float | None
    reason: str = ""

    def __str__(self) -> str:
        if self.pearson is None or self.spearman is None:
            return f"attribution against patching: undefined, {self.reason}"
        correlations = (
            f"Pearson {number_text(self.pearson, digits=3)}, Spearman {number_text(self.spearman, digits=3)}"
        )
        return f"attribution against patching, {self.n:,} cells: {correlations}"


def agreement(sweep_a: Sweep, sweep_b: Sweep) -> Agreement:
    """Correlate the effects of two sweeps, over the cells that both have.

    Raises:
        InputError: where the two do not have the same cells.
    """
    import numpy as np
    from scipy import stats

    for name, sweep in (("sweep_a", sweep_a), ("sweep_b", sweep_b)):
        require_kind(name, sweep, Sweep, "from Experiment.sweep or attribution")
    properties = ("what", "by", "layers", "metric")
    differing = [name for name in properties if getattr(sweep_a, name) != getattr(sweep_b, name)]
    if differing or sweep_a.values.shape != sweep_b.values.shape:
        raise InputError(f"agreement: the two sweeps differ in {', '.join(differing) or 'their shape'}")
    common = ~(np.ma.getmaskarray(sweep_a.values) | np.ma.getmaskarray(sweep_b.values))
    x, y = sweep_a.effect.data[common], sweep_b.effect.data[common]
    n = int(common.sum())
    if n < 3:
        return Agreement(n, None, None, f"only {count_phrase(n, 'cell')} measured in both")
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return Agreement(n, None, None, "one of the two is constant")
    return Agreement(n, float(stats.pearsonr(x, y)[0]), float(stats.spearmanr(x, y)[0]))
