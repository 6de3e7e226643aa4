"""What plugins bring, by name: conditions of causal metrics as edits, and metrics by layer before and after edits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from phaselens.data import Text, Tokens, texts_from
from phaselens.errors import InputError, MetricError, close_matches, is_whole
from phaselens.patching.edits import Clean, Edit
from phaselens.patching.passes import Hook
from phaselens.patching.points import brief, counted
from phaselens.patching.prompts import Prompt
from phaselens.patching.results import Shown
from phaselens.plugin import Batch, CausalMetric, Condition, Metric, plugins
from phaselens.plugin.returned import conditions_of, hook_names
from phaselens.runs import MetricResult, Observer, choose, gather
from phaselens.runs.engine import measure
from phaselens.runs.interventions import Editor
from phaselens.runs.work import batch_of

if TYPE_CHECKING:
    from torch import Tensor

    from phaselens.lens import HookedTransformer
    from phaselens.lens.rows import Rows

# On so much text a condition chooses its cells and layers: enough for two folds, a second or two on the bundled pair.
_TEXTS, _TOKENS = 8, 128


def causal_names() -> list[str]:
    """Names of the installed causal metrics."""
    return [name for name in _usable() if issubclass(plugins().metric(name), CausalMetric)]


def metric_names() -> list[str]:
    """Names of the installed metrics that look at a run and leave it as it is."""
    return [name for name in _usable() if not issubclass(plugins().metric(name), CausalMetric)]


def _usable() -> list[str]:
    found = []
    for name in plugins().names:
        try:
            plugins().metric(name)
        except InputError:  # a plugin that does not work is told of by `phaselens plugins`
            continue
        found.append(name)
    return found


@dataclass(frozen=True, repr=False)
class Apply(Edit):
    """A condition of a causal metric is put on the run of `prompt`."""

    metric: str
    condition: Condition
    prompt: Prompt

    def _on(self, clean: Prompt, corrupt: Prompt | None) -> Edit:
        return replace(self, prompt=clean if corrupt is None else corrupt)

    def _misfit(self, clean: Prompt, corrupt: Prompt | None) -> str | None:
        """The condition's positions are those of texts of any length; it has to write to some that the prompts have."""
        n_tokens = len(clean)
        for edit in self.condition.edits:
            if edit.positions is None or any(position < n_tokens for position in edit.positions):
                return None
        return f"the prompts have {counted(n_tokens, 'token')}, and none at which it writes"

    def hooks(self, clean: Clean, rows: Rows) -> list[Hook]:
        """A hook for each of the condition's edits."""
        first = _PromptEditor(self, 1)
        editors = {1: first}

        def fire(number: int) -> Any:
            def write(tensor: Tensor, hook: Any) -> Tensor | None:
                n_texts = tensor.shape[0]
                if n_texts not in editors:
                    editors[n_texts] = _PromptEditor(self, n_texts)
                positions = rows.positions() if rows.running else first.positions
                return editors[n_texts].editor.apply(number, tensor, positions)

            return write

        return [(edit.point, fire(number)) for number, edit in enumerate(first.editor.edits)]

    def __str__(self) -> str:
        at = "" if self.condition.layer is None else f", layer {self.condition.layer}"
        return f"condition {self.metric}: {self.condition.name}{at}"


class _PromptEditor:
    """A condition's editor for a batch of `n` copies of one prompt: edits that look at texts find it in each."""

    def __init__(self, step: Apply, n: int) -> None:
        import torch

        lens = step.prompt.lens
        tokens = Tokens(Text("prompt", step.prompt.text), step.prompt.ids, len(step.prompt))
        batch: Batch = batch_of(lens, [tokens] * n, list(range(n)))
        self.editor = Editor(lens, step.condition.edits, batch)
        self.positions = torch.arange(len(step.prompt), device=lens.device)[None]


def find_condition(
    lens: HookedTransformer, name: str, which: str | None, layer: int | None, params: Mapping[str, Any]
) -> Condition:
    """The condition of causal metric `name` that was meant.

    The metric sees the unedited model on a few of the bundled texts first, as in a run: some conditions choose by them
    what to edit.

    Raises:
        InputError: where the metric is none, has no such condition, or several and none was named.
    """
    if not isinstance(name, str):
        raise InputError(f"condition: a causal metric is named by a text, got {brief(name)}")
    if which is not None and not isinstance(which, str):
        raise InputError(f"which={brief(which)}: give the name of one of the conditions of {name}")
    if layer is not None:
        if not is_whole(layer):
            raise InputError(f"layer={brief(layer)}: a condition has one layer; give a whole number")
        layer = int(layer)
        if -lens.info.n_layers <= layer < 0:
            layer += lens.info.n_layers
    kind = plugins().metric(name)
    if not issubclass(kind, CausalMetric):
        raise InputError(f"{name} changes nothing, so it has no condition; see metric({name!r})")
    known = {spec.name for spec in kind.Params.specs()}
    given = {**params, **({"layer": layer} if layer is not None and "layer" in known else {})}
    (one,) = choose([(name, given)])
    metric: Any = one.metric(lens.info, one.params, 0)
    metric.bos = lens.bos
    texts = _texts(lens)
    if hook_names(metric):
        gather(lens, texts, metric, [[place] for place in range(len(texts))])
    found = conditions_of(metric)
    if not found:
        raise InputError(
            f"{name} has no condition for {lens.info.label}: {'; '.join(metric.warnings) or 'no reason given'}"
        )
    return _picked(name, found, which, layer)


def _texts(lens: HookedTransformer) -> list[Tokens]:
    if lens.text_tokenizer is None:
        raise InputError(f"model {lens.info.label!r} has no tokenizer; conditions are chosen on texts")
    texts = texts_from("bundled", _TEXTS)
    encoder = lens.encoder()
    return [encoder.tokens(text, _TOKENS) for text in texts]


def _picked(name: str, found: Sequence[Condition], which: str | None, layer: int | None) -> Condition:
    names = dict.fromkeys(one.name for one in found)
    if which is not None and which not in names:
        raise InputError(f"{name} has no condition {which!r}; {close_matches(which, names)}")
    # A control is meant only where it is named.
    left = [one for one in found if (one.control_for is None if which is None else one.name == which)]
    if layer is not None:
        left = [one for one in left if one.layer == layer]
    if not left:
        layers = sorted({one.layer for one in found if one.layer is not None})
        raise InputError(
            f"{name} has no such condition in layer {layer}; its layers here: {layers or 'none'}"
        )
    if len({one.layer for one in left}) > 1:
        listed = ", ".join(f"{one.name} (layer {one.layer})" for one in left)
        raise InputError(
            f"{name} has {len(left)} conditions, {listed}; name a layer: condition({name!r}, layer=…)"
        )
    return left[0]


#: Layer, before, after, clean.
Row = tuple[int, float | None, float | None, float | None]


@dataclass(frozen=True, repr=False)
class Measured(Shown):
    """A metric by layer: of the prompt's run without the edits, with them, and of the clean run.

    `rows` are (layer, before, after, clean); a value is None where it is missing. `nulls` are the same with what the
    metric calls its null, the value of nothing at work, in each of the three runs; empty for a metric without one.
    `warnings` say why something is missing; `set_aside` are the edits that did not fit the prompts. `bos` is the
    prompts' BOS policy.
    """

    metric: str
    column: str
    unit: str
    rows: tuple[Row, ...]
    warnings: tuple[str, ...] = ()
    nulls: tuple[Row, ...] = ()
    set_aside: tuple[str, ...] = ()
    bos: str = field(kw_only=True)

    def __str__(self) -> str:
        """A table with the null of each run beside its value."""
        cells = [["layer", "before", "after", "clean"]]
        cells += [[str(layer), *map(_shown, values)] for layer, *values in self.rows]
        if self.nulls:
            null_cells = [["null"] * 3, *([_shown(null) for null in nulls] for _, *nulls in self.nulls)]
            cells = [
                [line[0], *(cell for pair in zip(line[1:], null_line, strict=True) for cell in pair)]
                for line, null_line in zip(cells, null_cells, strict=True)
            ]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        # A value's null stands close to it, and runs apart.
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


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def shown_column(kind: type[Metric[Any]]) -> tuple[str, str, str]:
    """(table, column, unit) that a metric shows by layer.

    Raises:
        InputError: for a causal metric, and one that shows nothing by layer.
    """
    if issubclass(kind, CausalMetric):
        raise InputError(
            f"{kind.name} is a causal metric: put its condition on the run, condition({kind.name!r}, …)"
        )
    display = kind.display
    if display is None or display.rows != "layer":
        raise InputError(f"{kind.name} shows no number by layer; use phaselens run -p {kind.name}")
    spec = kind.spec(display.table)
    return display.table, display.value, spec.columns[spec.index(display.value)].unit or ""


class ByLayer(NamedTuple):
    """What a metric shows of each layer of one run: its values, their nulls (empty without one), and its warnings."""

    values: dict[int, float | None]
    nulls: dict[int, float | None]
    warnings: list[str]


def by_layer(prompt: Prompt, name: str, params: Mapping[str, Any]) -> ByLayer:
    """What the metric shows of each layer, on one prompt, of the model as it is hooked now.

    Raises:
        InputError: for a metric or parameter that does not exist.
        MetricError: for a metric that fails.
    """
    (chosen,) = choose([(name, params)])
    table, column, _ = shown_column(chosen.metric)
    results = {name: MetricResult(chosen.metric, chosen.params, chosen.distribution)}
    tokens = Tokens(Text("prompt", prompt.text), prompt.ids, len(prompt))
    tables, warnings = measure(
        prompt.lens,
        [tokens],
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
    # One text has no interval, which is not shown here either.
    shown_warnings = [warning for warning in warnings if not warning.endswith("intervals are null")]
    return ByLayer(column_by_layer(column), column_by_layer(null) if null else {}, shown_warnings)
