"""The checks of the contract, each on a `Bench`: one metric, tiny models in float64, texts of many lengths."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

from phaselens.plugin import CausalMetric, LayerView, Metric, Params, Table
from phaselens.testing.contract import Broken, Skipped
from phaselens.testing.memory import peaks_by_length
from phaselens.testing.models import tiny_lens
from phaselens.testing.planted import Planted, plant

#: What it is tried on: a name for people, and a family of tiny models. The windows are shorter than the texts.
KINDS = {
    "rope": "llama",
    "nope": "llama-drope-nope",
    "grouped queries": "llama-gqa",
    "windowed": "mistral",
    "mixed rope and nope": "smollm3",
}
TEXTS = (
    "to be or not to be",
    "a",
    "that is the question: whether",
    "ay",
    "tis nobler in the mind to suffer",
    "nine",
)
#: Sums of float64 in another order differ by about 1e-15; this leaves room for what a metric makes of them.
RELATIVE, ABSOLUTE = 1e-7, 1e-9
_MATRIX = ("hook_pattern", "hook_attn_scores")
_OF_ATTENTION = ("hook_sink", "hook_entropy", "hook_received", "hook_distance", "hook_pattern")
#: Memory at twice the length: 2 where it grows with the text, 4 where it grows with its square.
_MOST_GROWTH = 2.8

Tables = Mapping[str, Table]


class Bench:
    """One metric with its parameters, and the models that it served."""

    def __init__(self, metric: type[Metric[Any]], params: Params, allow_matrix: bool) -> None:
        self.metric = metric
        self.params = params
        self.allow_matrix = allow_matrix
        self.refused: dict[str, str] = {}
        self._usual: dict[str, Any] = {}

    def usual(self, kind: str) -> Any:
        """The run of all texts on one kind of model, measured once."""
        if kind not in self._usual:
            self._usual[kind] = self.run(self.lenses[kind])
        return self._usual[kind]

    def tables(self, run: Any) -> Tables:
        """This metric's tables in a run."""
        found: Tables = run.metrics[self.metric.name].tables
        return found

    @property
    def one(self) -> tuple[str, Any]:
        """One model, for what does not depend on the kind; with a window where it is served."""
        kind = "windowed" if "windowed" in self.lenses else next(iter(self.lenses))
        return kind, self.lenses[kind]

    def run(self, lens: Any, texts: Sequence[str] = TEXTS, **options: Any) -> Any:
        """A run of this metric alone; Broken with the traceback if it fails."""
        from phaselens.runs import run

        given = (self.metric, self.params.as_dict())
        finished = run(lens, metrics=[given], texts=texts, **options)
        for failure in finished.metrics[self.metric.name].failures:
            raise Broken(f"{failure}\n{failure.traceback}")
        return finished

    @cached_property
    def lenses(self) -> dict[str, Any]:
        """Models by kind, without those that the metric refuses by an InputError when it is constructed."""
        served = {}
        for kind, family in KINDS.items():
            lens = _lens(family)
            reason = self._refusal(lens)
            if reason is None:
                served[kind] = lens
            else:
                self.refused[kind] = reason
        if not served:
            raise Broken(f"it refuses every model: {next(iter(self.refused.values()))}")
        return served

    def _refusal(self, lens: Any) -> str | None:
        from phaselens.errors import InputError

        try:
            self.metric(lens.info, self.params)
        except InputError as error:
            return str(error)
        return None

    def tokens(self, lens: Any) -> list[Any]:
        """The texts as tokens of this model."""
        from phaselens.data import texts_from

        encoder = lens.encoder()
        return [encoder.tokens(text, 512) for text in texts_from(TEXTS)]

    def gathered(
        self, lens: Any, batches: Sequence[Sequence[int]], into: Metric[Any] | None = None
    ) -> Metric[Any]:
        """The metric with these batches of texts fed to it, not yet computed."""
        from phaselens.runs import gather

        metric = into if into is not None else self.metric(lens.info, self.params)
        gather(lens, self.tokens(lens), metric, batches)
        return metric

    def intervened(self, lens: Any, metric: Metric[Any], batches: Sequence[Sequence[int]]) -> Metric[Any]:
        """The same metric after its conditions were run on these batches, if it has any."""
        from phaselens.runs import gather_losses

        if isinstance(metric, CausalMetric):
            gather_losses(lens, self.tokens(lens), metric, batches)
        return metric


@lru_cache
def _lens(family: str) -> Any:
    """Wrapping a model takes longer than measuring it, so metrics that are checked in turn share them."""
    import torch

    return tiny_lens(family, dtype=torch.float64)


@lru_cache
def _uniform(positions: str) -> Planted:
    return plant("uniform attention", positions=positions)


def measures(bench: Bench) -> str:
    """It runs on each kind of model."""
    for kind in bench.lenses:
        bench.usual(kind)
    refused = "".join(f"; refuses {kind}: {reason}" for kind, reason in bench.refused.items())
    return f"{', '.join(bench.lenses)}{refused}"


def tables_as_declared(bench: Bench) -> str:
    """All declared tables are there, with rows of the declared types."""
    declared = {table.name for table in bench.metric.tables}
    n_rows = 0
    for kind in bench.lenses:
        found = bench.tables(bench.usual(kind))
        if set(found) != declared:
            raise Broken(f"{kind}: tables {sorted(found)}, declared are {sorted(declared)}")
        n_rows += sum(len(table.rows) for table in found.values())
    if not n_rows:
        raise Broken("every table is empty")
    return ", ".join(sorted(declared))


def strict_json(bench: Bench) -> str:
    """JSON of a run holds no NaN and no infinity, and reads back as it was."""
    for kind in bench.lenses:
        plain = bench.usual(kind).to_dict()
        try:
            text = json.dumps(plain, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise Broken(f"{kind}: {error}") from error
        if json.loads(text) != plain:
            raise Broken(f"{kind}: JSON does not read back as it was: a key is no str, or a list a tuple")
    return "no NaN, no infinity, reads back as it was"


def batches_do_not_matter(bench: Bench) -> str:
    """Each text alone (no pads) and all together (many pads): the same numbers."""
    worst = 0.0
    for kind, lens in bench.lenses.items():
        alone = bench.tables(bench.run(lens, batch_tokens=1))
        worst = max(
            worst, require_same(bench.tables(bench.usual(kind)), alone, f"{kind}, texts padded together")
        )
    return f"largest difference {worst:.1e}"


def halves_merge(bench: Bench) -> str:
    """Two instances that saw half of the texts each, merged in either direction, equal one that saw all."""
    worst = 0.0
    kind, lens = bench.one
    everything = [[0, 1], [2, 3], [4, 5]]
    whole = bench.intervened(lens, bench.gathered(lens, everything), everything).compute()
    for first, second in (([[0, 1], [2]], [[3], [4, 5]]), ([[3], [4, 5]], [[0, 1], [2]])):
        merged = bench.gathered(lens, first)
        merged.merge(bench.gathered(lens, second))
        if isinstance(merged, CausalMetric):
            # Conditions may depend on all that was seen, so each half of them is run by one that has seen all.
            twin = pickle.loads(pickle.dumps(merged))  # noqa: S301 - our own
            bench.intervened(lens, merged, first)
            merged.merge(bench.intervened(lens, twin, second))
        worst = max(worst, require_same(merged.compute(), whole, f"{kind}, halves merged"))
    return f"largest difference {worst:.1e}"


def state_round_trips(bench: Bench) -> str:
    """Pickled in the middle, it goes on as if nothing had happened."""
    kind, lens = bench.one
    everything = [[0, 1], [2, 3], [4, 5]]
    whole = bench.intervened(lens, bench.gathered(lens, everything), everything).compute()
    restored = pickle.loads(pickle.dumps(bench.gathered(lens, [[0, 1], [2, 3]])))  # noqa: S301 - our own
    found = bench.intervened(lens, bench.gathered(lens, [[4, 5]], into=restored), everything).compute()
    require_same(found, whole, f"{kind}, pickled", exact=True)
    return "pickled in the middle, nothing changes"


def same_twice(bench: Bench) -> str:
    """Two runs are the same to the last bit."""
    kind, lens = bench.one
    first, second = bench.tables(bench.usual(kind)), bench.tables(bench.run(lens))
    require_same(second, first, f"{kind}, the second run", exact=True)
    return "to the last bit"


def activations_stay(bench: Bench) -> str:
    """`update` changes no tensor that it is handed."""
    import torch

    changed: set[str] = set()
    update = bench.metric.update

    def watched(self: Metric[Any], layer: LayerView) -> None:
        before = {name: tensor.clone() for name, tensor in layer.items()}
        update(self, layer)
        for name, tensor in layer.items():
            if not torch.allclose(tensor, before[name], rtol=0.0, atol=0.0, equal_nan=True):
                changed.add(name)

    kind, lens = bench.one
    metric = _subclass(bench.metric, watched)(lens.info, bench.params)
    bench.gathered(lens, [[0, 2, 4]], into=metric)
    if changed:
        raise Broken(f"{kind}: update changed {', '.join(sorted(changed))}; work on a copy (`.clone()`)")
    return f"{len(metric.hooks())} hook points"


def short_text_is_null(bench: Bench) -> str:
    """A text of one token: it does not fail, and if it leaves nulls it says why."""
    if issubclass(bench.metric, CausalMetric) and bench.metric.prompts is not CausalMetric.prompts:
        raise Skipped("it runs prompts of its own")
    kind, lens = bench.one
    finished = bench.run(lens, texts=["a"], bos="never")
    tables = bench.tables(finished)
    missing = sum(cell is None for table in tables.values() for row in table.rows for cell in row)
    reasons = [one for one in finished.warnings if one.startswith(f"{bench.metric.name}: ")]
    if missing and not reasons:
        raise Broken(
            f"{kind}: {missing} cells are null for a text of one token, and self.warn says no reason"
        )
    return f"{missing} nulls, with their reasons" if missing else "no nulls"


def uniform_gives_null(bench: Bench) -> str:
    """Where all attention is uniform, a statistic of attention is its null."""
    display = bench.metric.display
    if display is None or display.null is None:
        raise Skipped("its display names no null")
    worst, n_values = 0.0, 0
    for positions in ("auto", "nope"):
        planted = _uniform(positions)
        metric = bench.metric(planted.lens.info, bench.params)
        if not any(name.endswith(_OF_ATTENTION) for name in metric.hooks()):
            raise Skipped("it reads no statistic of attention")
        table = bench.run(planted.lens, texts=[planted.text, *TEXTS]).rows(bench.metric.name, display.table)
        for value, null in zip(table.column(display.value), table.column(display.null), strict=True):
            if isinstance(value, int | float) and isinstance(null, int | float):
                worst, n_values = max(worst, abs(value - null)), n_values + 1
    if not n_values or worst > 1e-6:
        raise Broken(f"{display.value} differs from {display.null} by {worst:.1e}, in {n_values} values")
    return f"{display.value} is {display.null} to {worst:.1e}"


def memory_is_linear(bench: Bench) -> str:
    """Measured: the largest tensor and the most memory that an update takes, at two lengths."""
    kind, lens = next(iter(bench.lenses.items()))
    matrix = [name for name in bench.metric(lens.info, bench.params).hooks() if name.endswith(_MATRIX)]
    if matrix and bench.allow_matrix:
        raise Skipped(f"it may read {matrix[0]}")
    if matrix:
        raise Broken(f"it reads {matrix[0]}, which is [query, key]: O(L²); hook_sink, hook_entropy and hook_received "
                     "cost O(L), or allow it by allow_matrix (--allow-matrix)")  # fmt: skip
    (short, at_short), (long, at_long) = peaks_by_length(bench.metric, bench.params, KINDS[kind])
    growth = at_long / max(at_short, 1)
    said = f"{at_short / 2**20:.2f} MiB at {short} tokens, {at_long / 2**20:.2f} MiB at {long}"
    if growth > _MOST_GROWTH * long / short / 2:
        raise Broken(f"memory of update grows by {growth:.1f} for {long / short:g} times the text: {said}")
    return said


FIRST = "measures tiny models"
CHECKS: dict[str, Callable[[Bench], str]] = {
    FIRST: measures,
    "tables as declared": tables_as_declared,
    "strict JSON": strict_json,
    "batch size and padding change nothing": batches_do_not_matter,
    "halves merged equal the whole": halves_merge,
    "state survives pickling": state_round_trips,
    "same numbers twice": same_twice,
    "activations are not changed": activations_stay,
    "nulls have reasons": short_text_is_null,
    "uniform attention gives the null": uniform_gives_null,
    "memory grows with the text, not its square": memory_is_linear,
}


def require_same(found: Tables, expected: Tables, where: str, *, exact: bool = False) -> float:
    """The largest relative difference of two sets of tables; Broken names the first cell that differs."""
    if set(found) != set(expected):
        raise Broken(f"{where}: tables {sorted(found)} in place of {sorted(expected)}")
    worst = 0.0
    for name, table in expected.items():
        rows = found[name].rows
        if len(rows) != len(table.rows):
            raise Broken(f"{where}: table {name} has {len(rows)} rows in place of {len(table.rows)}")
        for place, (row, twin) in enumerate(zip(rows, table.rows, strict=True)):
            for column, cell, other in zip(table.spec.columns, row, twin, strict=True):
                off = _difference(cell, other)
                if off > (0.0 if exact else 1.0):
                    raise Broken(
                        f"{where}: {name}.{column.name}, row {place}: {cell!r} in place of {other!r}"
                    )
                worst = max(worst, off)
    return worst * RELATIVE


def _difference(one: Any, other: Any) -> float:
    """In units of what is allowed; infinite where anything but a number differs."""
    if one == other:
        return 0.0
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) / (ABSOLUTE + RELATIVE * max(abs(one), abs(other)))
    return math.inf


def _subclass(
    metric: type[Metric[Any]], update: Callable[[Metric[Any], LayerView], None]
) -> type[Metric[Any]]:
    return type(metric.__name__, (metric,), {"update": update, "__module__": metric.__module__})
