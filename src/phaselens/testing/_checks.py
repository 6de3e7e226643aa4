"""The checks of the contract on a `MetricUnderTest`: one metric, tiny models in float64, texts of many lengths."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from phaselens.data import TokenizedText, texts_from
from phaselens.errors import InputError
from phaselens.lens.info import ROTATION_MODES
from phaselens.lens.points import STATISTICS, is_attention, is_matrix
from phaselens.plugin import (
    CausalMetric,
    CellValue,
    LayerView,
    Metric,
    MetricWarning,
    Params,
    Table,
)
from phaselens.runs import Run, feed_losses, feed_metric, run
from phaselens.testing.findings import Broken, Skipped
from phaselens.testing.memory import peaks_by_length, with_update
from phaselens.testing.models import tiny_lens
from phaselens.testing.planted import Planted, plant
from phaselens.testing.restored import through_file

if TYPE_CHECKING:
    from phaselens.lens import HookedTransformer

#: The models of the checks: a name for messages, and a family of tiny models. Their windows are shorter than the texts.
MODELS = {
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
#: float64 sums in another order differ by about 1e-15; the tolerance leaves room for what a metric computes from them.
RELATIVE, ABSOLUTE = 1e-7, 1e-9
#: Largest allowed growth of memory at twice the length: linear growth gives 2, quadratic growth 4.
_MAX_GROWTH = 2.8

Tables = Mapping[str, Table]
Batches = Sequence[Sequence[int]]

#: Indices of `TEXTS` in batches: all of them, and in two halves.
ALL_BATCHES = [[0, 1], [2, 3], [4, 5]]
HALVES = ([[0, 1], [2]], [[3], [4, 5]])


class MetricUnderTest:
    """One metric with its parameters, and the models that it accepts."""

    def __init__(self, metric: type[Metric[Any]], params: Params, allow_matrix: bool) -> None:
        self.metric = metric
        self.params = params
        self.allow_matrix = allow_matrix
        self.refusals: dict[str, str] = {}
        self._default_runs: dict[str, Run] = {}

    def default_run(self, model: str) -> Run:
        """Return the run of all texts on one model, measured once."""
        if model not in self._default_runs:
            self._default_runs[model] = self.run(self.lenses[model])
        return self._default_runs[model]

    def tables(self, finished_run: Run) -> Tables:
        """Return this metric's tables in a run."""
        return finished_run.metrics[self.metric.name].tables

    @property
    def main_model(self) -> tuple[str, HookedTransformer]:
        """Name and lens of the model for checks that need only one; windowed if the metric accepts it."""
        model = "windowed" if "windowed" in self.lenses else next(iter(self.lenses))
        return model, self.lenses[model]

    def run(self, lens: HookedTransformer, texts: Sequence[str] = TEXTS, **options: Any) -> Run:
        """Run this metric alone; raise Broken with the traceback if it fails."""
        request = (self.metric, self.params.as_dict())
        result = run(lens, metrics=[request], texts=texts, **options)
        for failure in result.metrics[self.metric.name].failures:
            raise Broken(f"{failure}\n{failure.traceback}")
        return result

    @cached_property
    def lenses(self) -> dict[str, HookedTransformer]:
        """Lenses by model name, without models that the metric refuses by an InputError when it is constructed."""
        accepted = {}
        for model, family in MODELS.items():
            lens = _lens(family)
            reason = self._refusal(lens)
            if reason is None:
                accepted[model] = lens
            else:
                self.refusals[model] = reason
        if not accepted:
            raise Broken(f"it refuses every model: {next(iter(self.refusals.values()))}")
        return accepted

    def _refusal(self, lens: HookedTransformer) -> str | None:
        try:
            self.metric(lens.info, self.params)
        except InputError as error:
            return str(error)
        return None

    def tokens(self, lens: HookedTransformer) -> list[TokenizedText]:
        """Return the texts as tokens of this model."""
        encoder = lens.encoder()
        return [encoder.tokenize(text, 512) for text in texts_from(TEXTS)]

    def feed(
        self, lens: HookedTransformer, batches: Batches, metric: Metric[Any] | None = None
    ) -> Metric[Any]:
        """Pass batches of texts to `metric` (by default a new instance) and return it; compute nothing yet."""
        instance = metric if metric is not None else self.metric(lens.info, self.params)
        feed_metric(lens, self.tokens(lens), instance, batches)
        return instance

    def run_conditions(self, lens: HookedTransformer, metric: Metric[Any], batches: Batches) -> Metric[Any]:
        """Run the conditions of `metric`, if it has any, on these batches, and return it."""
        if isinstance(metric, CausalMetric):
            feed_losses(lens, self.tokens(lens), metric, batches)
        return metric


@lru_cache
def _lens(family: str) -> HookedTransformer:
    """Create a tiny lens, cached: wrapping a model takes longer than measuring it, so that all checks share one."""
    import torch

    return tiny_lens(family, dtype=torch.float64)


@lru_cache
def _uniform(rotation_mode: str) -> Planted:
    return plant("uniform attention", positions=rotation_mode)


def measures_models(subject: MetricUnderTest) -> str:
    """Check that the metric runs on each model."""
    for model in subject.lenses:
        subject.default_run(model)
    refusals = "".join(f"; refuses {model}: {reason}" for model, reason in subject.refusals.items())
    return f"{', '.join(subject.lenses)}{refusals}"


def tables_as_declared(subject: MetricUnderTest) -> str:
    """Check that the run has all declared tables and no others."""
    declared = {table.name for table in subject.metric.tables}
    n_rows = 0
    for model in subject.lenses:
        tables = subject.tables(subject.default_run(model))
        if set(tables) != declared:
            raise Broken(f"{model}: tables {sorted(tables)}, declared are {sorted(declared)}")
        n_rows += sum(len(table.rows) for table in tables.values())
    if not n_rows:
        raise Broken("every table is empty")
    return ", ".join(sorted(declared))


def strict_json(subject: MetricUnderTest) -> str:
    """Check that JSON of a run contains no NaN and no infinity, and reads back unchanged."""
    for model in subject.lenses:
        run_values = subject.default_run(model).to_dict()
        try:
            text = json.dumps(run_values, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise Broken(f"{model}: {error}") from error
        if json.loads(text) != run_values:
            raise Broken(
                f"{model}: JSON does not read back as it was: a key is not a str, or a list is a tuple"
            )
    return "no NaN, no infinity, reads back as it was"


def same_in_any_batch(subject: MetricUnderTest) -> str:
    """Check that each text alone (no pads) and all together (many pads) have the same results."""
    largest_difference = 0.0
    for model, lens in subject.lenses.items():
        unpadded = subject.tables(subject.run(lens, batch_tokens=1))
        largest_difference = max(
            largest_difference,
            require_same(
                subject.tables(subject.default_run(model)), unpadded, f"{model}, texts padded together"
            ),
        )
    return f"largest difference {largest_difference:.1e}"


def halves_merge(subject: MetricUnderTest) -> str:
    """Check that two instances with half of the texts each, merged in either order, equal one with all texts."""
    largest_difference = 0.0
    model, lens = subject.main_model
    expected = subject.run_conditions(lens, subject.feed(lens, ALL_BATCHES), ALL_BATCHES).compute()
    for halves in (HALVES, HALVES[::-1]):
        merged = _merged_halves(subject, halves, lambda metric: metric)
        largest_difference = max(
            largest_difference, require_same(merged.compute(), expected, f"{model}, halves merged")
        )
    return f"largest difference {largest_difference:.1e}"


def _merged_halves(
    subject: MetricUnderTest, halves: Sequence[Batches], passed_on: Callable[[Metric[Any]], Metric[Any]]
) -> Metric[Any]:
    """Return the merge of two instances with half of the texts each; `passed_on` returns each half's instance, or one
    with its state."""
    _, lens = subject.main_model
    first, second = halves
    merged = passed_on(subject.feed(lens, first))
    merged.merge(passed_on(subject.feed(lens, second)))
    if isinstance(merged, CausalMetric):
        # Conditions may depend on all texts, so an instance that has seen all of them measures each half.
        twin = through_file(merged)
        merged = passed_on(subject.run_conditions(lens, merged, first))
        merged.merge(passed_on(subject.run_conditions(lens, twin, second)))
    return merged


def state_round_trips(subject: MetricUnderTest) -> str:
    """Check that results stay the same to the bit if an instance's state goes through a file: between two batches,
    before its tables are made, and before two halves are merged."""
    model, lens = subject.main_model
    # Sequences of its own are packed into other batches, which changes the last digits.
    exact = not subject.metric.reads_own_sequences()
    expected = subject.run_conditions(lens, subject.feed(lens, ALL_BATCHES), ALL_BATCHES).compute()
    restored = through_file(subject.feed(lens, ALL_BATCHES[:2]))
    continued = subject.run_conditions(
        lens, subject.feed(lens, ALL_BATCHES[2:], metric=restored), ALL_BATCHES
    )
    require_same(through_file(continued).compute(), expected, f"{model}, restored from a file", exact=exact)
    merged, merged_from_files = (
        _merged_halves(subject, HALVES, passed_on) for passed_on in (lambda metric: metric, through_file)
    )
    require_same(
        merged_from_files.compute(), merged.compute(), f"{model}, halves merged from files", exact=exact
    )
    return "written to a file and read, nothing changes"


def same_twice(subject: MetricUnderTest) -> str:
    """Check that two runs agree to the last bit."""
    model, lens = subject.main_model
    first, second = subject.tables(subject.default_run(model)), subject.tables(subject.run(lens))
    require_same(second, first, f"{model}, the second run", exact=True)
    return "to the last bit"


def activations_unchanged(subject: MetricUnderTest) -> str:
    """Check that `update` does not change the tensors that it receives."""
    import torch

    changed: set[str] = set()
    update = subject.metric.update

    def checked_update(self: Metric[Any], layer: LayerView) -> None:
        before = {name: tensor.clone() for name, tensor in layer.items()}
        update(self, layer)
        for name, tensor in layer.items():
            if not torch.allclose(tensor, before[name], rtol=0.0, atol=0.0, equal_nan=True):
                changed.add(name)

    model, lens = subject.main_model
    metric = with_update(subject.metric, checked_update)(lens.info, subject.params)
    subject.feed(lens, [[0, 2, 4]], metric=metric)
    if changed:
        raise Broken(f"{model}: update changed {', '.join(sorted(changed))}; work on a copy (`.clone()`)")
    return f"{len(metric.hooks())} hook points"


def short_text_is_missing(subject: MetricUnderTest) -> str:
    """Check that a text of one token does not fail the metric, and that missing values come with a warning."""
    if issubclass(subject.metric, CausalMetric) and subject.metric.prompts is not CausalMetric.prompts:
        raise Skipped("it runs its own prompts")
    model, lens = subject.main_model
    result = subject.run(lens, texts=["a"], bos="never")
    tables = subject.tables(result)
    missing = sum(cell is None for table in tables.values() for row in table.rows for cell in row)
    has_reason = any(isinstance(warning, MetricWarning) for warning in result.warnings)
    if missing and not has_reason:
        raise Broken(
            f"{model}: {missing} cells are missing for a text of one token, and self.warn gives no reason"
        )
    return f"{missing} missing values, with their reasons" if missing else "no missing values"


def uniform_gives_null(subject: MetricUnderTest) -> str:
    """Check that a statistic of attention equals its null if all attention is uniform."""
    display = subject.metric.display
    if display is None or display.null is None:
        raise Skipped("its display names no null")
    largest_difference, n_values = 0.0, 0
    for rotation_mode in ROTATION_MODES:
        planted = _uniform(rotation_mode)
        metric = subject.metric(planted.lens.info, subject.params)
        if not any(map(is_attention, metric.hooks())):
            raise Skipped("it reads no statistic of attention")
        table = subject.run(planted.lens, texts=[planted.text, *TEXTS]).rows(
            subject.metric.name, display.table
        )
        for value, null in zip(table.column(display.value), table.column(display.null), strict=True):
            if isinstance(value, int | float) and isinstance(null, int | float):
                largest_difference, n_values = max(largest_difference, abs(value - null)), n_values + 1
    if not n_values or largest_difference > 1e-6:
        raise Broken(
            f"{display.value} differs from {display.null} by {largest_difference:.1e}, in {n_values} values"
        )
    return f"{display.value} is {display.null} to {largest_difference:.1e}"


def memory_is_linear(subject: MetricUnderTest) -> str:
    """Check that the memory of `update`, measured at two lengths, grows no faster than the text."""
    model, lens = next(iter(subject.lenses.items()))
    matrix = list(filter(is_matrix, subject.metric(lens.info, subject.params).hooks()))
    if matrix and subject.allow_matrix:
        raise Skipped(f"it may read {matrix[0]}")
    if matrix:
        raise Broken(f"it reads {matrix[0]}, which is [query, key]: O(L²); read a statistic that costs O(L) "
                     f"({', '.join(STATISTICS)}), or pass allow_matrix=True (--allow-matrix)")  # fmt: skip
    peaks = peaks_by_length(subject.metric, subject.params, MODELS[model])
    (length, peak), (longer_length, longer_peak) = peaks
    growth, stretch = longer_peak / max(peak, 1), longer_length / length
    description = (
        f"{peak / 2**20:.2f} MiB at {length} tokens, {longer_peak / 2**20:.2f} MiB at {longer_length}"
    )
    if growth > _MAX_GROWTH * stretch / 2:
        raise Broken(
            f"memory of update grows by a factor of {growth:.1f} for {stretch:g} times the text: {description}"
        )
    return description


FIRST_CHECK = "measures tiny models"
CHECKS: dict[str, Callable[[MetricUnderTest], str]] = {
    FIRST_CHECK: measures_models,
    "tables as declared": tables_as_declared,
    "strict JSON": strict_json,
    "batch size and padding change nothing": same_in_any_batch,
    "halves merged equal the whole": halves_merge,
    "state survives a file": state_round_trips,
    "same numbers twice": same_twice,
    "activations are not changed": activations_unchanged,
    "missing values have reasons": short_text_is_missing,
    "uniform attention gives the null": uniform_gives_null,
    "memory grows with the text, not its square": memory_is_linear,
}


def require_same(tables: Tables, expected: Tables, context: str, *, exact: bool = False) -> float:
    """Return the largest relative difference between two sets of tables; raise Broken for a cell that differs."""
    if set(tables) != set(expected):
        raise Broken(f"{context}: tables {sorted(tables)} instead of {sorted(expected)}")
    largest_difference = 0.0
    for name, table in expected.items():
        rows = tables[name].rows
        if len(rows) != len(table.rows):
            raise Broken(f"{context}: table {name} has {len(rows)} rows instead of {len(table.rows)}")
        for row_index, (row, expected_row) in enumerate(zip(rows, table.rows, strict=True)):
            for column, cell, expected_cell in zip(table.spec.columns, row, expected_row, strict=True):
                difference = _difference(cell, expected_cell)
                if difference > (0.0 if exact else 1.0):
                    raise Broken(
                        f"{context}: {name}.{column.name}, row {row_index}: {cell!r} instead of {expected_cell!r}"
                    )
                largest_difference = max(largest_difference, difference)
    return largest_difference * RELATIVE


def _difference(cell: CellValue, expected: CellValue) -> float:
    """Return the difference in units of the tolerance; infinite if anything but a float differs."""
    if cell == expected:
        return 0.0
    if isinstance(cell, float) and isinstance(expected, float):
        return abs(cell - expected) / (ABSOLUTE + RELATIVE * max(abs(cell), abs(expected)))
    return math.inf
