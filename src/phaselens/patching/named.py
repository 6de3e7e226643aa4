"""What plugins bring, by name: conditions of causal metrics as edits, and metrics by layer before and after edits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phaselens.data import Text, Tokens, texts_from
from phaselens.errors import InputError, MetricError, close_matches
from phaselens.patching.edits import Clean, Edit
from phaselens.patching.passes import Hook
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
    """A condition of a causal metric is put on the run."""

    metric: str
    condition: Condition
    prompt: Prompt

    def hooks(self, clean: Clean) -> list[Hook]:
        """A hook for each of the condition's edits."""
        first = _Rows(self, 1)
        rows = {1: first}

        def fire(number: int) -> Any:
            def write(tensor: Tensor, hook: Any) -> Tensor | None:
                n = tensor.shape[0]
                if n not in rows:
                    rows[n] = _Rows(self, n)
                return rows[n].editor.apply(number, tensor, first.positions)

            return write

        return [(edit.point, fire(number)) for number, edit in enumerate(first.editor.edits)]

    def __str__(self) -> str:
        at = "" if self.condition.layer is None else f", layer {self.condition.layer}"
        return f"condition {self.metric}: {self.condition.name}{at}"


class _Rows:
    """A condition's editor for a forward of `n` rows, all of one prompt: edits that look at texts find it in each."""

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


@dataclass(frozen=True, repr=False)
class Measured(Shown):
    """A metric by layer: of the prompt's run without the edits, with them, and of the clean run.

    `rows` are (layer, before, after, clean); a value is None where it is missing. `warnings` say why.
    """

    metric: str
    column: str
    unit: str
    rows: tuple[tuple[int, float | None, float | None, float | None], ...]
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        unit = f", {self.unit}" if self.unit else ""
        lines = [
            f"{self.metric}: {self.column}{unit}",
            f"{'layer':>5}{'before':>10}{'after':>10}{'clean':>10}",
        ]
        for layer, *values in self.rows:
            shown = "".join(f"{'–' if value is None else format(value, '.4f'):>10}" for value in values)
            lines.append(f"{layer:5}{shown}")
        return "\n".join([*lines, *(f"note: {warning}" for warning in self.warnings)])


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


def by_layer(
    prompt: Prompt, name: str, params: Mapping[str, Any]
) -> tuple[dict[int, float | None], list[str]]:
    """What the metric shows of each layer, on one prompt, of the model as it is hooked now; and its warnings."""
    (one,) = choose([(name, params)])
    table, column, _ = shown_column(one.metric)
    results = {name: MetricResult(one.metric, one.params, one.distribution)}
    tokens = Tokens(Text("prompt", prompt.text), prompt.ids, len(prompt))
    tables, warnings = measure(
        prompt.lens,
        [tokens],
        [one],
        results,
        batch_tokens=1 << 30,
        seed=0,
        observer=Observer(),
        bos=prompt.bos,
    )
    for failure in results[name].failures:
        raise MetricError(f"metric {name} failed: {failure}")
    records = tables[name][table].records()
    found: dict[int, float | None] = {}
    for record in records:
        value = record[column]
        found[int(record["layer"])] = float(value) if isinstance(value, int | float) else None  # type: ignore[arg-type]
    # One text has no interval, which is not shown here either.
    return found, [each for each in warnings if not each.endswith("intervals are null")]
