"""What the built-in metrics share: columns, tables by text, layer and head, and the reasons of missing values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from phaselens.plugin import Column, LayerView, Metric, Params, Table, TableSpec, interval_help, param

if TYPE_CHECKING:
    import numpy as np

P = TypeVar("P", bound=Params)

TEXT = Column("text", str, None, "the text's id")
LAYER = Column("layer", int, "index", "0-based")
HEAD = Column("head", int, "index", "0-based")
N_TOKENS = Column("n_tokens", int, "tokens", "tokens of the text for this model")
N_TEXTS = Column("n_texts", int, "texts", "texts with a value")
TOKEN = Column("token", str, None, "the token there")
TOKEN_ID = Column("token_id", int, "index", "its id")

#: Why a text has no value in a layer, by the code that is kept beside its numbers.
FINE, SHORT, NOT_FINITE, ZERO, UNSEEN = 0, 1, 2, 3, 4
_REASONS = {
    SHORT: "fewer than two tokens",
    NOT_FINITE: "activations are NaN or infinite",
    ZERO: "activations are all zero",
    UNSEEN: "with a window of 1, no query but the first sees position 0",
}


@dataclass(frozen=True)
class RowParams(Params):
    """For metrics that tell massive rows from others."""

    massive_factor: float = param(
        10.0, help="a row is massive if its norm is this many times the median row's", minimum=1
    )


@dataclass(frozen=True)
class Value:
    """A number that every text has in every layer (or head). `null` says what its null value is, if it has one."""

    name: str
    unit: str
    help: str
    null: str = ""


class Grid(Metric[P]):
    """A metric whose values are [text, layer] or [text, layer, head].

    Subclasses keep each value under its name in `per_text`, its null under `{name}_null`, and codes for what went
    wrong under `problem`; what follows from kept values is put into `derived` by `compute`. The tables `texts`,
    `heads` and `layers` are made from that.
    """

    def setup(self) -> None:
        """No value is derived before all are gathered."""
        self.derived: dict[str, np.ndarray] = {}

    def values(self, name: str) -> np.ndarray:
        """[text, layer] or [text, layer, head], NaN where missing."""
        found: np.ndarray = self.derived[name] if name in self.derived else self.per_text.stack(name)
        return found

    def texts_table(self, values: Sequence[Value]) -> Table:
        """A row per text and layer (and head, where a value has heads)."""
        import numpy as np

        columns = [self.values(name) for value in values for name in _names(value)]
        shape = max((column.shape for column in columns), key=len)
        columns = [_spread(column, shape) for column in columns]
        texts, lengths = self.per_text.texts, self.per_text.lengths
        return self.table(
            "texts",
            (
                (texts[at[0]], *at[1:], *(cell(column[at]) for column in columns), lengths[at[0]])
                for at in np.ndindex(shape)
            ),
        )

    def layers_table(self, values: Sequence[Value]) -> Table:
        """Means over texts (and heads), with intervals and nulls."""
        columns = self._means(values, over_heads=True)
        return self.table("layers", ((layer, *row) for layer, row in enumerate(zip(*columns, strict=True))))

    def heads_table(self, values: Sequence[Value]) -> Table:
        """Means over texts, by layer and head."""
        import numpy as np

        columns = [np.array(column, dtype=object) for column in self._means(values)]
        shape = columns[0].shape
        return self.table("heads", ((*at, *(column[at] for column in columns)) for at in np.ndindex(shape)))

    def _means(self, values: Sequence[Value], *, over_heads: bool = False) -> list[Any]:
        """Mean, low, high and null (where there is one) of each value in turn, each [layer] or [layer, head]; None
        where unknown."""
        import numpy as np

        found = [self.values(value.name) for value in values]
        shape = max((each.shape for each in found), key=len)
        nulls = [
            self.values(f"{value.name}_null") if value.null else np.full(shape, np.nan) for value in values
        ]
        measured, chance = (np.stack([_spread(each, shape) for each in part], 1) for part in (found, nulls))
        if over_heads and len(shape) == 3:
            measured, chance = measured.mean(-1), chance.mean(-1)
        interval = intervals(self, measured)
        base = intervals(self, chance, where=~np.isnan(measured), n_resamples=1)[0]
        columns = []
        for place, value in enumerate(values):
            columns += [each[place] for each in interval] + ([base[place]] if value.null else [])
        return columns

    def mean_by_layer(self, name: str) -> np.ndarray:
        """Mean over texts (and heads) [layer]; NaN where no text has a value."""
        import numpy as np

        found = self.values(name)
        if found.ndim == 3:
            found = found.mean(-1)
        present = ~np.isnan(found)
        total, count = np.where(present, found, 0.0).sum(0), present.sum(0)
        means: np.ndarray = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
        return means

    def n_texts(self, name: str) -> int:
        """Texts that have a value in every layer."""
        import numpy as np

        found = self.values(name)
        return int((~np.isnan(found)).reshape(len(found), -1).all(1).sum())

    def explain(self, what: str, name: str = "problem") -> None:
        """Warn of every reason for which `what` is missing somewhere."""
        import numpy as np

        codes = self.values(name)
        for code, reason in _REASONS.items():
            hit = codes == code
            if not hit.any():
                continue
            layers = np.flatnonzero(hit.any(0))
            where = "" if len(layers) == hit.shape[1] else f" in layer {', '.join(map(str, layers))}"
            self.warn(f"{what} is null: {reason}{where} for text {some(self.per_text.texts, hit.any(1))}")
        if 0 < (codes == FINE).all(1).sum() < 2:
            self.warn("fewer than 2 texts with values: intervals are null")


def grid_tables(values: Sequence[Value], *, heads: bool = False) -> tuple[TableSpec, ...]:
    """The specs of `texts`, `layers` and (with `heads`) `heads` for these values."""
    at = (LAYER, HEAD) if heads else (LAYER,)
    texts = (TEXT, *at, *(column for value in values for column in _text_columns(value, values)), N_TOKENS)
    means = tuple(column for value in values for column in _mean_columns(value, values))
    by_head = (
        (TableSpec("heads", (*at, *means), "a row per layer and head: means over texts"),) if heads else ()
    )
    over = "texts and heads" if heads else "texts"
    return (
        TableSpec("texts", texts, f"a row per text{', layer and head' if heads else ' and layer'}"),
        TableSpec("layers", (LAYER, *means), f"a row per layer: means over {over}"),
        *by_head,
    )


def real_rows(layer: LayerView, name: str) -> Iterator[Any]:
    """For each text of the batch: `layer[name]` without its pads, [pos, …]."""
    tensor = layer[name]
    for row, length in enumerate(layer.batch.lengths):
        yield tensor[row, :length]


def keep(metric: Metric[Any], layer: LayerView, found: Sequence[Mapping[str, Any]]) -> None:
    """Store one mapping of numbers (or small lists of numbers) for each text of the batch."""
    import torch

    stacked = {name: torch.tensor([each[name] for each in found], dtype=torch.float64) for name in found[0]}
    metric.per_text.add(layer, **stacked)


def intervals(
    metric: Metric[Any],
    values: np.ndarray,
    *,
    where: np.ndarray | None = None,
    n_resamples: int | None = None,
) -> list[Any]:
    """values [text, …], NaN where missing, in the order of `per_text` → mean over texts, low and high, each […]; None
    where unknown. Texts that `where` [text, …] leaves out do not count.

    Texts are drawn in the order of what they say: the order in which they came changes nothing.
    """
    import numpy as np

    from phaselens.uncertainty import N_RESAMPLES, mean_interval

    order = metric.per_text.by_content
    present = ~np.isnan(values) if where is None else where & ~np.isnan(values)
    found = mean_interval(
        values[order], present=present[order], n_resamples=n_resamples or N_RESAMPLES, seed=metric.seed
    )
    return [each.tolist() for each in found]


def interval_columns(unit: str, low: str = "ci_low", high: str = "ci_high") -> tuple[Column, Column]:
    """The two ends of an interval."""
    help_ = interval_help()
    return Column(low, float, unit, help_), Column(high, float, unit, help_)


def nothing(values: Sequence[Value], problem: int) -> dict[str, float]:
    """What a text without values in a layer leaves: NaN, and why."""
    return dict.fromkeys((name for value in values for name in _names(value)), float("nan")) | {
        "problem": problem
    }


def cell(value: Any) -> float | None:
    """NaN, which marks a missing value here, as the None that it is in a table."""
    return None if value != value else float(value)


def best(values: np.ndarray) -> int | None:
    """Where the largest value stands, missing ones left out; None where there is none."""
    import numpy as np

    return None if np.isnan(values).all() else int(np.nanargmax(values))


def overall(values: np.ndarray) -> float | None:
    """Mean of what is present, or None."""
    import numpy as np

    present = values[~np.isnan(values)]
    return float(present.mean()) if present.size else None


def some(texts: Sequence[str], chosen: np.ndarray) -> str:
    """The first few of the chosen texts' ids, and how many more there are."""
    names = [repr(text) for text, is_chosen in zip(texts, chosen, strict=True) if is_chosen]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _names(value: Value) -> list[str]:
    return [value.name, f"{value.name}_null"] if value.null else [value.name]


def _spread(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """[text, layer] on every head, where the shape has heads."""
    import numpy as np

    return values if values.ndim == len(shape) else np.broadcast_to(values[..., None], shape)


def _prefix(value: Value, values: Sequence[Value]) -> str:
    """The first value's columns are `ci_low`, `ci_high`, `null`; the others' carry their name."""
    return "" if value is values[0] else f"{value.name}_"


def _text_columns(value: Value, values: Sequence[Value]) -> list[Column]:
    columns = [Column(value.name, float, value.unit, value.help)]
    if value.null:
        columns.append(Column(f"{_prefix(value, values)}null", float, value.unit, value.null))
    return columns


def _mean_columns(value: Value, values: Sequence[Value]) -> list[Column]:
    prefix = _prefix(value, values)
    ends = (f"{prefix}{'' if prefix else 'ci_'}{end}" for end in ("low", "high"))
    columns = [Column(value.name, float, value.unit, value.help), *interval_columns(value.unit, *ends)]
    if value.null:
        columns.append(Column(f"{prefix}null", float, value.unit, value.null))
    return columns
