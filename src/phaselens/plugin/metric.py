"""The base class of metrics, and the check that a class can be used as one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from phaselens.errors import close_matches, require_kind, require_text
from phaselens.lens.info import ModelInfo
from phaselens.lens.points import N_DISTANCES, depends_on_sink_position
from phaselens.plugin import params as parameters
from phaselens.plugin.author_errors import UnknownName, author_error, describe_value, source_location
from phaselens.plugin.display import Display, FigurePanel
from phaselens.plugin.report_section import ReportSection
from phaselens.plugin.sequences import TokenSequence
from phaselens.plugin.states import attributes_to_store, plain_copy, restored
from phaselens.plugin.tables import Table, TableSpec
from phaselens.plugin.views import Batch, LayerView, PerText
from phaselens.plugin.warning import MetricWarning

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Attributes that a new instance is given, so that a state need not hold them.
_NOT_STATE = ("model", "params", "seed")

P = TypeVar("P", bound=parameters.Params)


class Metric(ABC, Generic[P]):
    """A metric that measures one model. Subclass it; only `hooks`, `update` and `compute` must be defined.

    The run creates one instance per model, passes it every layer of every batch once (`update`), and asks for its
    tables at the end (`compute`). Keep state in `self.per_text`, or in attributes created in `setup`, which `merge`
    must then merge too: a long run measures shards of the texts, each in an instance of its own, saves the `state` of
    each, and merges them. What cannot be measured is None in a table, with the reason given to `self.warn`.

    Draw random numbers from a generator of your own, created from `self.seed` in `setup`: all metrics of the run share
    the global generators of PyTorch and NumPy, so one metric's draws would change another's.
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
    #: Whether `update` also gets layers of which the model lacks some of the points (a hybrid's layer without
    #: attention). By default such a layer is left out, and its values are missing.
    partial_layers: ClassVar[bool] = False
    #: Whether a printed run shows the metric beside others. One that only supplies details to reports and files sets it
    #: to False; `--table` prints its tables.
    prints: ClassVar[bool] = True
    #: Panels that the metric contributes to figure sets, which several metrics make up together.
    figure_panels: ClassVar[tuple[FigurePanel, ...]] = ()

    def __init__(self, model: ModelInfo, params: P, seed: int = 0) -> None:
        self.model = model
        self.params = params
        self.seed = seed
        self.per_text = PerText()
        self.warnings: list[MetricWarning] = []
        self.setup()

    def setup(self) -> None:
        """Create further state if `per_text` is not enough; `self.model` and `self.params` are set."""
        return

    @property
    def sink_position(self) -> int:
        """The key position whose share of attention `hook_sink` holds for this metric. Metrics with the same position
        share a pass."""
        return 0

    @property
    def needs_sink_position(self) -> bool:
        """Whether the metric reads a hook point that depends on `sink_position`, as `hook_sink` does."""
        return any(map(depends_on_sink_position, self.hooks()))

    @property
    def n_distances(self) -> int:
        """The number of distances that `hook_distance` must hold for this metric; it may hold more for others."""
        return N_DISTANCES

    @abstractmethod
    def hooks(self) -> Sequence[str]:
        """Return the names of the hook points to read. `{layer}` in a name means every layer:
        `blocks.{layer}.attn.hook_sink`."""

    def sequences(self, texts: Batch, tokenizer: Any) -> Sequence[TokenSequence] | None:
        """Return token sequences to read instead of the run's texts, or None for the run's texts.

        Called once before the first update. `texts` holds all texts of the run; do not change its tensors. The
        sequences can be variants of them, with other tokens, or prompts of the metric's own, made by
        `Encoder(tokenizer, bos=self.model.bos, bos_token_id=self.model.bos_token_id)`. `update` then receives batches
        whose `texts` are the sequences' ids, and whose `indices` are their places in this list.
        """
        return None

    @classmethod
    def reads_own_sequences(cls) -> bool:
        """Return whether the metric defines `sequences`."""
        return cls.sequences is not Metric.sequences

    def reads(self, batch: Batch) -> bool:
        """Return whether `update` should receive this batch; every batch by default.

        A batch that no metric reads costs no forward. The choice may depend on `batch.indices`, the places of the texts
        in the run, so that a metric can keep details of its first texts.
        """
        return True

    @abstractmethod
    def update(self, layer: LayerView) -> None:
        """Process one layer of one batch."""

    @abstractmethod
    def compute(self) -> Mapping[str, Table]:
        """Return the tables of this model, by name, each as declared in `tables` (see `self.table`)."""

    def merge(self, other: Metric[P]) -> None:
        """Add the values and warnings of `other`, the same metric on other texts."""
        self.per_text.merge(other.per_text)
        for warning in other.warnings:
            self.warn(warning)

    def state(self) -> dict[str, Any]:
        """Return what the metric has collected, as a tree of plain values that a file can hold.

        The tree has all attributes except `model`, `params` and `seed`, and without those that `__getstate__` leaves
        out. They may hold None, bool, int, float, str, lists, tuples, sets, dicts, NumPy arrays, tensors on the CPU,
        random generators, dataclasses and NamedTuples, and objects with `state` and `load_state` of their own.

        Raises:
            TypeError: for an attribute that holds anything else; names it.
        """
        return {
            name: plain_copy(value, f"{type(self).__name__}.{name}")
            for name, value in attributes_to_store(self).items()
            if name not in _NOT_STATE
        }

    def load_state(self, tree: Mapping[str, Any]) -> None:
        """Restore a `state` of an instance of the same class and parameters. Call it on a new instance.

        Raises:
            InputError: for anything but a mapping.
        """
        require_kind("tree", tree, Mapping, "as Metric.state returns it")
        attributes = {name: restored(value, vars(self).get(name)) for name, value in tree.items()}
        set_state = getattr(self, "__setstate__", None)
        if set_state is None:
            vars(self).update(attributes)
        else:
            set_state({**vars(self), **attributes})

    @classmethod
    def define(cls, params: P) -> str:
        """Return the definition that these parameters choose, in one line; it heads the printed table."""
        return ", ".join(f"{name} = {value}" for name, value in params.as_dict().items())

    @classmethod
    def report(cls, tables: Mapping[str, Table], params: P) -> Sequence[ReportSection]:
        """Return sections that the metric adds to the HTML report; none by default.

        `tables` holds the run's tables by name, with a column `model` before the declared ones. Everything in a section
        is shown as text.
        """
        return ()

    @classmethod
    def plot(cls, tables: Mapping[str, Table], figure: Figure) -> None:
        """Draw the metric's own picture into an empty matplotlib `figure`, for `--figures`. Set `plots = True` too.

        `tables` holds the run's tables by name, with a column `model` before the declared ones. A metric without `plot`
        has its display drawn.
        """
        raise NotImplementedError(f"{cls.__name__} sets plots = True but does not define plot")

    def warn(self, message: str, code: str | None = None) -> None:
        """Record the reason for a missing value, or another caution; the run prints each one once.

        `code` names the reason for programs, as `TOO_FEW_TEXTS` does. A `MetricWarning` keeps the code that it has.
        """
        if message not in self.warnings:
            self.warnings.append(MetricWarning(message, code))

    @classmethod
    def spec(cls, table: str) -> TableSpec:
        """Return the declared table of that name."""
        for spec in cls.tables:
            if spec.name == table:
                return spec
        names = [spec.name for spec in cls.tables]
        raise UnknownName(f"{cls.name} declares no table {table!r}; {close_matches(str(table), names)}")

    @classmethod
    def table(cls, name: str, rows: Iterable[Sequence[Any]]) -> Table:
        """Build the declared table `name` from `rows`."""
        return cls.spec(name).build(rows)


def require_metric(candidate: Any, origin: str) -> type[Metric[Any]]:
    """Return `candidate` if it is a usable Metric class; else raise TypeError with `origin` and what is wrong."""
    require_text("origin", origin)
    if not (isinstance(candidate, type) and issubclass(candidate, Metric)):
        raise author_error(f"{origin}: {candidate!r} is not a subclass of phaselens.plugin.Metric")
    for attribute, attribute_type, example in _ATTRIBUTES:
        value = getattr(candidate, attribute, None)
        if not isinstance(value, attribute_type) or value == "":
            problem = (
                f"sets no `{attribute}`"
                if value is None
                else f"sets `{attribute}` to {describe_value(value)}"
            )
            raise _metric_error(
                candidate, origin, f"{problem} ({attribute_type.__name__}); write {attribute} = {example}"
            )
    for attribute, attribute_type in _OPTIONAL_ATTRIBUTES.items():
        value = getattr(candidate, attribute)
        if not isinstance(value, attribute_type):
            problem = f"sets `{attribute}` to {describe_value(value)}; give a {attribute_type.__name__}"
            raise _metric_error(candidate, origin, problem)
    if any(character.isspace() or character == "," for character in candidate.name):
        raise _metric_error(
            candidate, origin, f"is called {candidate.name!r}; give a name without spaces and commas"
        )
    for table in candidate.tables:
        if not isinstance(table, TableSpec):
            raise _metric_error(
                candidate, origin, f"has {describe_value(table)} among its `tables`; give TableSpecs"
            )
    undefined = sorted(getattr(candidate, "__abstractmethods__", ()))
    if undefined:
        raise _metric_error(candidate, origin, f"does not define {', '.join(undefined)}")
    params_class: Any = candidate.Params
    if not (isinstance(params_class, type) and issubclass(params_class, parameters.Params)):
        raise _metric_error(
            candidate,
            origin,
            f"sets `Params` to {describe_value(params_class)}; give a subclass of phaselens.plugin.Params",
        )
    candidate.Params.specs()
    if candidate.display is not None:
        if not isinstance(candidate.display, Display):
            raise _metric_error(
                candidate, origin, f"sets `display` to {describe_value(candidate.display)}; give a Display"
            )
        _require_columns(candidate, origin, "the display", candidate.display)
    panels = candidate.figure_panels
    if not isinstance(panels, tuple) or not all(isinstance(panel, FigurePanel) for panel in panels):
        raise _metric_error(
            candidate,
            origin,
            f"sets `figure_panels` to {describe_value(panels)}; give a tuple of FigurePanels",
        )
    for panel in panels:
        _require_columns(candidate, origin, f"figure panel {panel.name!r}", panel.display)
    return candidate


#: Attributes that a metric must set: name, type, example.
_ATTRIBUTES: tuple[tuple[str, type, str], ...] = (
    ("name", str, '"my-metric"'),
    ("version", str, '"1"'),
    ("tables", tuple, '(TableSpec("texts", (Column("text", str), …)),)'),
)
#: Class attributes that have a default, by their type: a property would be an object of every instance.
_OPTIONAL_ATTRIBUTES: dict[str, type] = {
    **dict.fromkeys(("title", "description", "citation"), str),
    **dict.fromkeys(("plots", "partial_layers", "prints"), bool),
}


def _metric_error(metric: type[Metric[Any]], origin: str, problem: str) -> Exception:
    location = source_location(metric)
    suffix = f" ({location})" if location else ""
    return author_error(f"{origin}: {metric.__name__} {problem}{suffix}", location)


def _require_columns(metric: type[Metric[Any]], origin: str, owner: str, display: Display) -> None:
    """Raise TypeError if the display shows a column that no table has; printing would fail for every metric."""
    problem = display.missing_column(metric.tables)
    if problem:
        raise author_error(f"{origin}: {owner} of {metric.__name__}: {problem}", source_location(metric))
