"""The class that a metric is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

from phaselens.errors import close_matches, is_list_like, require_text
from phaselens.lens.info import ModelInfo
from phaselens.plugin import params as parameters
from phaselens.plugin.mistakes import UnknownName, kind_of, mistake, source_of
from phaselens.plugin.tables import Table, TableSpec
from phaselens.plugin.views import LayerView, PerText

if TYPE_CHECKING:
    from matplotlib.figure import Figure

P = TypeVar("P", bound=parameters.Params)


@dataclass(frozen=True)
class Display:
    """How a person sees the metric: one of its tables with `rows` (layers, or conditions) down and models across.

    `value` is the column shown, `low` and `high` the ends of its interval, `null` its null value. A layer
    whose value is `strong` or more, and over its null, is coloured and marked; `strong_means` says what
    that is. `also` holds more columns of the same table, each with its heading; where conditions are the rows,
    those in `before` stand before the value. `summary` holds columns of the `summary` table, each with its
    heading, for the line under each model. Numbers get `digits` decimals.

    `by_head` names a column of the table `heads` that is worth a picture of layers × heads.
    """

    value: str
    title: str
    table: str = "layers"
    rows: Literal["layer", "condition"] = "layer"
    low: str | None = None
    high: str | None = None
    null: str | None = None
    percent: bool = False
    strong: float | None = None
    strong_means: str = ""
    also: tuple[tuple[str, str], ...] = ()
    summary: tuple[tuple[str, str], ...] = ()
    digits: int = 3
    by_head: str | None = None
    before: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for name in ("value", "title", "table", "strong_means"):
            _require_text(name, getattr(self, name))
        for name in ("low", "high", "null", "by_head"):
            if getattr(self, name) is not None:
                _require_text(name, getattr(self, name))
        if not isinstance(self.percent, bool):
            raise mistake(f"Display(percent={self.percent!r}): give True or False")
        if isinstance(self.digits, bool) or not isinstance(self.digits, int) or self.digits < 0:
            raise mistake(f"Display(digits={self.digits!r}): give a whole number from 0")
        if self.strong is not None and (
            isinstance(self.strong, bool) or not isinstance(self.strong, int | float)
        ):
            raise mistake(f"Display(strong={self.strong!r}): give a number")
        for name in ("also", "summary", "before"):
            if not is_list_like(getattr(self, name)):
                raise mistake(
                    f"Display({name}=…) is {kind_of(getattr(self, name))}; give pairs (column, heading)"
                )
            for pair in getattr(self, name):
                if not (
                    isinstance(pair, tuple | list)
                    and len(pair) == 2
                    and all(isinstance(x, str) for x in pair)
                ):
                    raise mistake(f"Display({name}=…) holds {kind_of(pair)}; give pairs (column, heading)")
        if self.rows not in ("layer", "condition"):
            raise mistake(f"Display(rows={self.rows!r}): give 'layer' or 'condition'")


def _require_text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise mistake(f"Display({name}=…) is {kind_of(value)}; give text")


class Metric(ABC, Generic[P]):
    """One metric measuring one model. Subclass it; `hooks`, `update` and `compute` are all that is needed.

    The run makes one instance a model, hands it every layer of every batch once (`update`), and asks for
    its tables at the end (`compute`). State goes into `self.per_text`, or into attributes made in
    `setup`; then `merge` must know them too. What cannot be measured is None in a table, with a reason
    given to `self.warn`.

    Draw random numbers from a generator of your own, made from `self.seed` in `setup`: the global ones of PyTorch and
    NumPy belong to all metrics of the run, so that what one draws changes what the next one gets.
    """

    name: ClassVar[str]
    version: ClassVar[str]
    title: ClassVar[str] = ""
    description: ClassVar[str] = ""
    citation: ClassVar[str] = ""
    Params: ClassVar[type[parameters.Params]] = parameters.Params
    tables: ClassVar[tuple[TableSpec, ...]]
    display: ClassVar[Display | None] = None
    plots: ClassVar[bool] = False

    def __init__(self, model: ModelInfo, params: P, seed: int = 0) -> None:
        self.model = model
        self.params = params
        self.seed = seed
        self.per_text = PerText()
        self.warnings: list[str] = []
        self.setup()

    def setup(self) -> None:
        """Make more state here if `per_text` is not enough; `self.model` and `self.params` are there."""
        return

    @property
    def sink_position(self) -> int:
        """The key whose received share `hook_sink` holds for this metric. Metrics that want the same key
        share a pass."""
        return 0

    @property
    def n_distances(self) -> int:
        """How many distances `hook_distance` must hold for this metric; it may hold more, for others in the run."""
        return 64

    @abstractmethod
    def hooks(self) -> Sequence[str]:
        """Hook points it reads. `blocks.{layer}.attn.hook_sink` stands for every layer; `hook_embed` for
        itself."""

    @abstractmethod
    def update(self, layer: LayerView) -> None:
        """Take in one layer of one batch."""

    @abstractmethod
    def compute(self) -> Mapping[str, Table]:
        """The tables of this model, by name; each as declared in `tables` (see `self.table`)."""

    def merge(self, other: Metric[P]) -> None:
        """Take over what `other`, the same metric on other texts, has gathered, and its warnings."""
        self.per_text.merge(other.per_text)
        for warning in other.warnings:
            self.warn(warning)

    @classmethod
    def define(cls, params: P) -> str:
        """One line that says which definition these parameters choose; it heads the printed table."""
        return ", ".join(f"{name} = {value}" for name, value in params.as_dict().items())

    @classmethod
    def plot(cls, tables: Mapping[str, Table], figure: Figure) -> None:
        """Draw your own picture into an empty matplotlib `figure`, for `--figures`; set `plots = True` beside it.

        `tables` are the run's, by name; a column `model` stands before the declared ones. Without it, the display is
        drawn.
        """
        raise NotImplementedError(f"{cls.__name__} sets plots = True and defines no plot")

    def warn(self, message: str) -> None:
        """Give the reason for a missing value, or another caution; the run prints each one once."""
        if message not in self.warnings:
            self.warnings.append(message)

    @classmethod
    def spec(cls, table: str) -> TableSpec:
        """The declared table of that name."""
        for each in cls.tables:
            if each.name == table:
                return each
        names = [each.name for each in cls.tables]
        raise UnknownName(f"{cls.name} declares no table {table!r}; {close_matches(str(table), names)}")

    @classmethod
    def table(cls, name: str, rows: Iterable[Sequence[Any]]) -> Table:
        """The declared table `name`, filled with `rows`."""
        return cls.spec(name).build(rows)


def require_metric(candidate: Any, origin: str) -> type[Metric[Any]]:
    """`candidate` if it is a usable Metric class, else TypeError that names `origin` and what is missing."""
    require_text("origin", origin)
    if not (isinstance(candidate, type) and issubclass(candidate, Metric)):
        raise mistake(f"{origin}: {candidate!r} is no subclass of phaselens.plugin.Metric")
    for attribute, kind, example in _ATTRIBUTES:
        value = getattr(candidate, attribute, None)
        if not isinstance(value, kind) or value == "":
            problem = f"sets no `{attribute}`" if value is None else f"sets `{attribute}` to {kind_of(value)}"
            raise _mistake(candidate, origin, f"{problem} ({kind.__name__}); write {attribute} = {example}")
    if any(sign.isspace() or sign == "," for sign in candidate.name):
        raise _mistake(candidate, origin, f"is called {candidate.name!r}; a name has no spaces and no commas")
    for table in candidate.tables:
        if not isinstance(table, TableSpec):
            raise _mistake(candidate, origin, f"has {kind_of(table)} among its `tables`; give TableSpecs")
    undone = sorted(getattr(candidate, "__abstractmethods__", ()))
    if undone:
        raise _mistake(candidate, origin, f"does not define {', '.join(undone)}")
    given: Any = candidate.Params
    if not (isinstance(given, type) and issubclass(given, parameters.Params)):
        raise _mistake(
            candidate,
            origin,
            f"sets `Params` to {kind_of(given)}; give a subclass of phaselens.plugin.Params",
        )
    candidate.Params.specs()
    if candidate.display is not None:
        if not isinstance(candidate.display, Display):
            raise _mistake(
                candidate, origin, f"sets `display` to {kind_of(candidate.display)}; give a Display"
            )
        _require_display(candidate, candidate.display, origin)
    return candidate


#: What a metric must set, of which type, and how that looks.
_ATTRIBUTES: tuple[tuple[str, type, str], ...] = (
    ("name", str, '"my-metric"'),
    ("version", str, '"1"'),
    ("tables", tuple, '(TableSpec("texts", (Column("text", str), …)),)'),
)


def _mistake(metric: type[Metric[Any]], origin: str, problem: str) -> Exception:
    where = source_of(metric)
    place = f" ({where})" if where else ""
    return mistake(f"{origin}: {metric.__name__} {problem}{place}", where)


def _require_display(metric: type[Metric[Any]], display: Display, origin: str) -> None:
    """TypeError if the display shows what no table has; it would stop the printing of every metric."""
    tables = {table.name: {column.name for column in table.columns} for table in metric.tables}
    shown = {
        display.value,
        display.low,
        display.high,
        display.null,
        *(name for name, _ in (*display.before, *display.also)),
        "layer",
        display.rows,
    }
    wanted: dict[str, set[str | None]] = {"summary": {name for name, _ in display.summary}}
    wanted.setdefault(display.table, set()).update(shown)
    if display.by_head:
        wanted["heads"] = {display.by_head, "layer", "head"}
    for table, columns in wanted.items():
        missing = sorted(name for name in columns - tables.get(table, set()) if name)
        if missing:
            raise mistake(
                f"{origin}: the display of {metric.__name__}: table {table} has no column {missing[0]}; "
                f"{close_matches(missing[0], tables[table]) if table in tables else 'it declares no such table'}",
                source_of(metric),
            )
