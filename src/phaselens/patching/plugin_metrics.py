"""Metrics of plugins, by name: conditions of causal metrics as edits, and values by layer before and after edits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from phaselens.data import Text, TokenizedText, texts_from
from phaselens.errors import InputError, MetricError, close_matches, is_whole, short_form
from phaselens.lens.points import Hook, HookFunction
from phaselens.patching.edits import CleanActivations, Intervention
from phaselens.patching.prompts import Prompt
from phaselens.patching.results import TextResult
from phaselens.patching.wording import count_phrase, number_text
from phaselens.plugin import (
    TOO_FEW_TEXTS,
    Batch,
    CausalMetric,
    Column,
    Condition,
    Metric,
    Table,
    TableSpec,
    plugins,
)
from phaselens.plugin.return_checks import conditions_of, hook_names
from phaselens.runs import MetricResult, Observer, feed_metric, select_metrics
from phaselens.runs.batches import make_batch
from phaselens.runs.condition_editor import ConditionEditor
from phaselens.runs.engine import measure

if TYPE_CHECKING:
    from torch import Tensor

    from phaselens.lens import HookedTransformer
    from phaselens.lens.rows import Rows

# Text on which a condition selects its cells and layers: enough for two folds, and one or two seconds on the bundled
# pair.
_N_TEXTS, _MAX_TOKENS = 8, 128


def causal_names() -> list[str]:
    """Return the names of the installed causal metrics."""
    return [name for name in _usable_names() if issubclass(plugins().metric(name), CausalMetric)]


def metric_names() -> list[str]:
    """Return the names of the installed metrics that are not causal: they observe a run and change nothing."""
    return [name for name in _usable_names() if not issubclass(plugins().metric(name), CausalMetric)]


def _usable_names() -> list[str]:
    usable = []
    for name in plugins().names:
        try:
            plugins().metric(name)
        except InputError:  # `phaselens plugins` reports a plugin that does not work
            continue
        usable.append(name)
    return usable


@dataclass(frozen=True, repr=False)
class ApplyCondition(Intervention):
    """Apply a condition of a causal metric to the run of `prompt`."""

    metric: str
    condition: Condition
    prompt: Prompt

    def _moved_to(self, clean: Prompt, corrupt: Prompt | None) -> Intervention:
        return replace(self, prompt=clean if corrupt is None else corrupt)

    def _misfit_reason(self, clean: Prompt, corrupt: Prompt | None) -> str | None:
        """Return None if the condition, which is written for texts of any length, edits a position of the prompts."""
        n_tokens = len(clean)
        for edit in self.condition.edits:
            named_keys = None if callable(edit.keys) else edit.keys
            if all(
                numbers is None or any(number < n_tokens for number in numbers)
                for numbers in (edit.positions, named_keys)
            ):
                return None
        return f"the prompts have {count_phrase(n_tokens, 'token')}, and the condition edits none of them"

    def hooks(self, clean: CleanActivations, rows: Rows) -> list[Hook]:
        """Return one hook per edit of the condition."""
        single = _PromptEditor(self, 1)
        editors = {1: single}

        def edit_hook(edit_index: int) -> HookFunction:
            def write(tensor: Tensor, hook: object) -> Tensor | None:
                n_texts = tensor.shape[0]
                if n_texts not in editors:
                    editors[n_texts] = _PromptEditor(self, n_texts)
                positions = rows.positions() if rows.running else single.positions
                key_positions = rows.key_positions() if rows.running else None
                return editors[n_texts].editor.apply(edit_index, tensor, positions, key_positions)

            return single.editor.naming_keys(edit_index, write)

        return [(edit.point, edit_hook(index)) for index, edit in enumerate(single.editor.edits)]

    def __str__(self) -> str:
        condition = self.condition
        sites = [
            f", {noun} {number}"
            for noun, number in (("layer", condition.layer), ("head", condition.head))
            if number is not None
        ]
        return f"condition {self.metric}: {condition.name}{''.join(sites)}"


class _PromptEditor:
    """The editor of a condition for a batch of `n_texts` copies of its prompt, which edits can read as texts."""

    def __init__(self, intervention: ApplyCondition, n_texts: int) -> None:
        import torch

        prompt = intervention.prompt
        batch: Batch = make_batch(prompt.lens, [_tokens_of(prompt)] * n_texts, list(range(n_texts)))
        self.editor = ConditionEditor(prompt.lens, intervention.condition.edits, batch)
        self.positions = torch.arange(len(prompt), device=prompt.lens.device)[None]


def _tokens_of(prompt: Prompt) -> TokenizedText:
    return TokenizedText(Text("prompt", prompt.text), prompt.ids, len(prompt))


def find_condition(
    lens: HookedTransformer,
    name: str,
    condition_name: str | None,
    layer: int | None,
    params: Mapping[str, object],
    head: int | None = None,
) -> Condition:
    """Return the condition of the causal metric `name` that has this name, layer and head.

    The metric first observes the unedited model on a few of the bundled texts, as in a run: some conditions select what
    they edit from these texts.

    Raises:
        InputError: if the metric is not causal, has no such condition, or has several and none was named.
    """
    if not isinstance(name, str):
        raise InputError(f"condition: name is {short_form(name)}; give the name of a causal metric")
    if condition_name is not None and not isinstance(condition_name, str):
        raise InputError(f"which={short_form(condition_name)}: give the name of a condition of {name}")
    sizes = {"layer": lens.info.n_layers, "head": lens.info.n_heads}
    numbers = {
        noun: _counted_from_0(noun, number, sizes[noun])
        for noun, number in (("layer", layer), ("head", head))
        if number is not None
    }
    metric_class = plugins().metric(name)
    if not issubclass(metric_class, CausalMetric):
        raise InputError(f"{name} is not a causal metric, so it has no condition; use metric({name!r})")
    declared = {spec.name for spec in metric_class.Params.specs()}
    site_params = {noun: number for noun, number in numbers.items() if noun in declared}
    (chosen,) = select_metrics([(name, {**params, **site_params})])
    metric = metric_class(lens.info, chosen.params, 0)
    metric.bos = lens.bos
    tokenized_texts = _selection_texts(lens)
    if hook_names(metric):
        feed_metric(
            lens, tokenized_texts, metric, [[text_index] for text_index in range(len(tokenized_texts))]
        )
    conditions = conditions_of(metric)
    if not conditions:
        reasons = "; ".join(map(str, metric.warnings)) or "no reason given"
        raise InputError(f"{name} has no condition for {lens.info.label}: {reasons}")
    return _select_condition(name, conditions, condition_name, numbers)


def _counted_from_0(noun: str, number: int, n: int) -> int:
    """Return the layer or head of a condition counted from 0; a negative one counts from the end."""
    if not is_whole(number):
        raise InputError(f"{noun}={short_form(number)}: a condition has one {noun}; give a whole number")
    return int(number) + n if -n <= int(number) < 0 else int(number)


def _selection_texts(lens: HookedTransformer) -> list[TokenizedText]:
    if lens.text_tokenizer is None:
        raise InputError(
            f"model {lens.info.label!r} has no tokenizer; a condition is selected on texts, which need one"
        )
    encoder = lens.encoder()
    return [encoder.tokenize(text, _MAX_TOKENS) for text in texts_from("bundled", _N_TEXTS)]


def _select_condition(
    name: str, conditions: Sequence[Condition], condition_name: str | None, site: Mapping[str, int]
) -> Condition:
    names = dict.fromkeys(condition.name for condition in conditions)
    if condition_name is not None and condition_name not in names:
        raise InputError(
            f"{name} has no condition {condition_name!r}; {close_matches(condition_name, names)}"
        )
    # A control is selected only by its name.
    candidates = [
        condition
        for condition in conditions
        if (condition.control_for is None if condition_name is None else condition.name == condition_name)
    ]
    for noun, number in site.items():
        numbers = sorted({value for value in (getattr(c, noun) for c in candidates) if value is not None})
        candidates = [condition for condition in candidates if getattr(condition, noun) == number]
        if not candidates:
            raise InputError(
                f"{name} has no such condition in {noun} {number}; its {noun}s are {numbers or 'none'}"
            )
    for noun in ("layer", "head"):
        if len({getattr(condition, noun) for condition in candidates}) > 1:
            options = ", ".join(condition.label for condition in candidates[:12])
            more = f" and {len(candidates) - 12} more" if len(candidates) > 12 else ""
            raise InputError(
                f"{name} has {len(candidates)} conditions, {options}{more}; name a {noun}: "
                f"condition({name!r}, {noun}=…)"
            )
    return candidates[0]


LayerRow = tuple[int, float | None, float | None, float | None]
"""Layer, and the values before and after the edits and of the clean run."""


_RUNS = {"before": "without the edits", "after": "with the edits", "clean": "of the clean prompt"}


@dataclass(frozen=True, repr=False)
class MetricByLayer(TextResult):
    """A metric by layer: of the prompt's run without and with the edits, and of the clean run.

    `rows` are (layer, before, after, clean); a value is None where it is missing. `nulls` are the metric's chance
    baseline in the same form, empty for a metric without one. `warnings` say why a value is missing; `set_aside` are
    the edits that did not fit the prompts. `bos` is the prompts' BOS policy.
    """

    metric: str
    column: str
    unit: str
    rows: tuple[LayerRow, ...]
    warnings: tuple[str, ...] = ()
    nulls: tuple[LayerRow, ...] = ()
    set_aside: tuple[str, ...] = ()
    bos: str = field(kw_only=True)

    def to_table(self) -> Table:
        """Return the values by layer, and their nulls where the metric has one."""
        runs = ("before", "after", "clean")
        columns = [Column("layer", int, "index", "0-based")]
        columns += [
            Column(run, float, self.unit or None, f"{self.column} of the run {_RUNS[run]}") for run in runs
        ]
        if self.nulls:
            columns += [Column(f"null_{run}", float, self.unit or None, f"null of {run}") for run in runs]
        nulls: tuple[tuple[float | None, ...], ...] = tuple(row[1:] for row in self.nulls) or ((),) * len(
            self.rows
        )
        return TableSpec(self.metric, tuple(columns)).build(
            (*values, *null_values) for values, null_values in zip(self.rows, nulls, strict=True)
        )

    def __str__(self) -> str:
        """Return a table of the values, each with the null of the same run beside it."""
        cells = [["layer", "before", "after", "clean"]]
        cells += [[str(layer), *map(number_text, values)] for layer, *values in self.rows]
        if self.nulls:
            null_cells = [["null"] * 3, *(map(number_text, nulls) for _, *nulls in self.nulls)]
            cells = [
                [line[0], *(cell for pair in zip(line[1:], null_line, strict=True) for cell in pair)]
                for line, null_line in zip(cells, null_cells, strict=True)
            ]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        # A null is printed close to its value; wider gaps separate the runs.
        gaps = [0, *(2 if self.nulls and index % 2 else 4 for index in range(len(widths) - 1))]
        lines = [
            "".join(
                " " * gap + cell.rjust(width) for cell, gap, width in zip(line, gaps, widths, strict=True)
            )
            for line in cells
        ]
        unit = f", {self.unit}" if self.unit else ""
        notes = [f"bos: {self.bos}", *(f"note: {warning}" for warning in self.warnings)]
        notes += [f"set aside: {edit}" for edit in self.set_aside]
        return "\n".join([f"{self.metric}: {self.column}{unit}", *lines, *notes])


def displayed_column(metric_class: type[Metric[Any]]) -> tuple[str, str, str]:
    """Return (table, column, unit) of the number that a metric shows by layer.

    Raises:
        InputError: for a causal metric, or one that shows no number by layer.
    """
    name = metric_class.name
    if issubclass(metric_class, CausalMetric):
        raise InputError(
            f"{name} is a causal metric; apply its condition to the run by condition({name!r}, …)"
        )
    if metric_class.reads_own_sequences():
        raise InputError(
            f"{name} reads token sequences of its own, to which the edits of this prompt do not apply; use "
            f"phaselens run -p {name}"
        )
    display = metric_class.display
    if display is None or display.rows != "layer":
        raise InputError(f"{name} shows no number by layer; use phaselens run -p {name}")
    spec = metric_class.spec(display.table)
    return display.table, display.value, spec.columns[spec.index(display.value)].unit or ""


class LayerValues(NamedTuple):
    """A metric of one run by layer: its values, their nulls (empty for a metric without one), and its warnings."""

    values: dict[int, float | None]
    nulls: dict[int, float | None]
    warnings: list[str]


def measure_by_layer(prompt: Prompt, name: str, params: Mapping[str, object]) -> LayerValues:
    """Measure the metric by layer on one prompt, on the model with its current hooks.

    Raises:
        InputError: for a metric or parameter that does not exist.
        MetricError: for a metric that fails.
    """
    (chosen,) = select_metrics([(name, params)])
    table, column, _ = displayed_column(chosen.metric)
    results = {name: MetricResult(chosen.metric, chosen.params, chosen.distribution)}
    tables, warnings = measure(
        prompt.lens,
        [_tokens_of(prompt)],
        [chosen],
        results,
        batch_tokens=1 << 30,
        seed=0,
        observer=Observer(),
        bos=prompt.bos,
    )
    for failure in results[name].failures:
        raise MetricError(f"metric {name} failed: {failure}")
    records = tables[name][table].records()

    def column_by_layer(column: str) -> dict[int, float | None]:
        cells = {int(record["layer"]): record[column] for record in records}  # type: ignore[arg-type]
        return {
            layer: float(cell) if isinstance(cell, int | float) else None for layer, cell in cells.items()
        }

    null = chosen.metric.display.null if chosen.metric.display else None
    # One text has no interval, and none is shown.
    shown_warnings = [str(warning) for warning in warnings if warning.code != TOO_FEW_TEXTS]
    return LayerValues(column_by_layer(column), column_by_layer(null) if null else {}, shown_warnings)
