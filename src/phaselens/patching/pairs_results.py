"""Results over many pairs of prompts: means over pairs with their intervals."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from phaselens.patching.results import Sweep, TextResult
from phaselens.patching.wording import count_phrase, number_text
from phaselens.plugin import Column, Table, TableSpec

if TYPE_CHECKING:
    import numpy as np

_INTERVAL = "95 % interval over pairs, percentile bootstrap"


@dataclass(frozen=True, repr=False)
class PairsSweep(Sweep):
    """A sweep over many pairs: `values`, `base` and `clean` are means over pairs, and `effect` is the mean effect.

    `low` and `high` are the ends of the interval of each cell's effect, masked with fewer than two pairs. `sweeps`
    holds the sweep of each pair. A word is `…` where the pairs differ.
    """

    low: np.ma.MaskedArray[Any, Any] = field(kw_only=True)
    high: np.ma.MaskedArray[Any, Any] = field(kw_only=True)
    sweeps: tuple[Sweep, ...] = field(kw_only=True)

    @property
    def n_pairs(self) -> int:
        """The number of pairs."""
        return len(self.sweeps)

    @property
    def title(self) -> str:
        """The kind of activation, the axes, and the number of pairs."""
        return f"{super().title}, mean over {count_phrase(self.n_pairs, 'pair')}"

    def cells(self) -> Iterator[dict[str, Any]]:
        """Yield each cell as a row, as `Sweep.cells` does, with `ci_low` and `ci_high` of its effect."""
        import numpy as np

        for cell, low, high in zip(super().cells(), self.low.flat, self.high.flat, strict=True):
            ends = (None if end is np.ma.masked else float(end) for end in (low, high))
            yield {**cell, **dict(zip(("ci_low", "ci_high"), ends, strict=True))}

    def to_table(self) -> Table:
        """Return all cells as a table: the axes, `value`, `effect`, its interval, and the number of pairs."""
        table = super().to_table()
        unit = f"of {self.metric}"
        columns = [column for column in table.spec.columns if not column.name.endswith("_token")]
        names = [column.name for column in columns]
        spec = TableSpec(
            table.spec.name,
            (
                *columns,
                Column("ci_low", float, unit, _INTERVAL),
                Column("ci_high", float, unit, _INTERVAL),
                Column("n_pairs", int, "pairs", "pairs of prompts"),
            ),
            table.spec.help,
        )
        return spec.build(
            (*(cell[name] for name in names), cell["ci_low"], cell["ci_high"], self.n_pairs)
            for cell in self.cells()
        )

    def __str__(self) -> str:
        lines = [
            self.title,
            f"{self.metric}: corrupt {number_text(self.base)}, clean {number_text(self.clean)}; strongest cells, with "
            "95 % intervals over pairs:",
        ]
        for cell in self.strongest():
            indices = ", ".join(f"{axis} {cell[axis]}" for axis in self.axes)
            ends = " … ".join(number_text(cell[end], signed=True) for end in ("ci_low", "ci_high"))
            lines.append(f"  {indices}: {number_text(cell['effect'], signed=True)}  {ends}")
        return "\n".join([*lines, f"bos: {self.bos}"])


_PAIRS_TABLE = TableSpec(
    "pairs",
    (
        Column("run", str, None, "corrupt, edited, clean, or edited − corrupt"),
        Column("value", float, "of the metric", "mean over pairs"),
        Column("ci_low", float, "of the metric", _INTERVAL),
        Column("ci_high", float, "of the metric", _INTERVAL),
        Column("n_pairs", int, "pairs", "pairs of prompts"),
    ),
    "The metric of each run, mean over pairs.",
)


@dataclass(frozen=True, repr=False)
class PairsResult(TextResult):
    """The metric of many pairs, without and with the edits.

    `values` is [pair, run], of the corrupt run without edits, with edits, and of the clean run.
    """

    metric: str
    values: np.ndarray
    edits: tuple[str, ...]
    bos: str = field(kw_only=True)

    def to_table(self) -> Table:
        """Return the mean over pairs of each run and of the edits' effect, with intervals."""
        import numpy as np

        from phaselens.uncertainty import mean_interval

        corrupt, edited, clean = self.values.T
        columns = np.stack([corrupt, edited, clean, edited - corrupt], axis=1)
        intervals = [bound.tolist() for bound in mean_interval(columns)]
        names = ("corrupt", "edited", "clean", "edited − corrupt")
        return _PAIRS_TABLE.build((*row, len(self.values)) for row in zip(names, *intervals, strict=True))

    def __str__(self) -> str:
        after = count_phrase(len(self.edits), "edit")
        lines = [f"{self.metric}, mean over {count_phrase(len(self.values), 'pair')}, {after}:"]
        for run, value, low, high, _ in self.to_table().rows:
            ends = " … ".join(number_text(end, signed=True) for end in (low, high))  # type: ignore[arg-type]
            lines.append(f"  {run:16} {number_text(value, signed=True):>9}  {ends}")  # type: ignore[arg-type]
        return "\n".join([*lines, f"bos: {self.bos}"])
