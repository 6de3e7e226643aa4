"""Loss and predictions when heads attend less to the sink, or not at all: its scores are shifted, rows renormalised.

The motive is Barbero et al. 2025 (arXiv:2504.02732): heads that attend to the sink mix less. `bos-v` leaves the
attention where it is and takes the value; `bos-mlp` takes the norm that makes the key. Here the attention itself goes
to the other keys, in the proportions that it has among them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from phaselens.plugin import (
    BASELINE,
    CAUSAL_TABLES,
    Condition,
    ConditionKey,
    Display,
    Edit,
    InputError,
    LayerView,
    Metric,
    Params,
    Table,
    TextOutcome,
    hookimpl,
    in_layer,
    param,
)
from phaselens_plugins._causal import REACH, Ablation, merge_nested, require_layer
from phaselens_plugins._common import TableRow, head_exists, mean_or_none
from phaselens_plugins._doses import (
    ALL_LAYERS,
    DOSES,
    EACH_HEAD,
    EACH_LAYER,
    GIVEN,
    QUESTION_OF,
    QUESTIONS,
    OtherKeys,
    ShiftScores,
    draw_doses,
    parse_shifts,
    shift_text,
)
from phaselens_plugins._inner import ConditionSource, InnerMetrics
from phaselens_plugins.bos_mlp import BosMlp, BosMlpParams
from phaselens_plugins.bos_v import BosV, BosVParams

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCORES = "attn.hook_key_scores"


@dataclass(frozen=True)
class SinkRemovalParams(Params):
    """Parameters of the metric."""

    shifts: str = param(
        "-inf,-4,-1,0,2",
        help="what is added to the scores of the key, in nats, separated by commas; -inf removes the key, 0 is the "
        "unedited model",
    )
    at: str = param(
        "all",
        help="in all layers at once (all); also in every layer, one at a time (layers); also in every head, one at a "
        "time (heads)",
        choices=("all", "layers", "heads"),
    )
    layer: int | None = param(
        None, help="an additional layer to edit alone, 0-based", unit="index", minimum=0
    )
    head: int | None = param(
        None, help="the head of `layer` to edit; none: all of its heads", unit="index", minimum=0
    )
    sink_position: int = param(0, help="the key whose scores are shifted", unit="position", minimum=0)
    seeds: int = param(
        1,
        help="other keys drawn for the control of each shift, one after the other; 0: no control",
        unit="keys",
        minimum=0,
    )
    beside: bool = param(True, help="also run bos-v and bos-mlp, for the table questions")

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_shifts(self.shifts)
        if self.head is not None and self.layer is None:
            raise InputError(f"head is {self.head}, but no layer is given; give the layer of the head, too")


class Scope(NamedTuple):
    """The heads that a condition edits: `layer` and `head` are None for all; `layers` are those edited."""

    name: str
    layers: tuple[int, ...]
    layer: int | None = None
    head: int | None = None


class SinkRemoval(Ablation[SinkRemovalParams]):
    """Metric of the loss and the divergence of predictions with the sink's scores shifted."""

    name = "sink-removal"
    partial_layers = True  # bos-mlp reads layers without attention too
    version = "1"
    title = "attention to the sink removed"
    description = "loss when heads attend less to one key, or not at all, and their rows are renormalised"
    citation = "motive: Barbero et al. 2025, arXiv:2504.02732"
    Params = SinkRemovalParams
    tables = (*CAUSAL_TABLES, REACH, DOSES, QUESTIONS)
    needs_divergence = True
    nested_defaults: ClassVar[Mapping[str, str]] = {"beside": "false"}
    display = Display(
        table="doses",
        rows="condition",
        before=(("mass", "attention"),),
        value="delta_nats",
        title="Δ nats",
        low="delta_low",
        high="delta_high",
        also=(("kl", "KL"), ("control_nats", "another key")),
    )
    plots = True

    @classmethod
    def define(cls, params: SinkRemovalParams) -> str:
        """State the edit, the layers and the control."""
        shifts = ", ".join(shift_text(shift) for shift in parse_shifts(params.shifts))
        layers = {
            "all": "all layers at once",
            "layers": "all layers at once and each layer alone",
            "heads": "all layers at once, each layer and each head alone",
        }[params.at]
        if params.layer is not None:
            layers += f", and layer {params.layer}" + ("" if params.head is None else f", head {params.head}")
        control = f"; control: another key of each text, {params.seeds} draws" if params.seeds else ""
        return (
            f"scores of later queries on key {params.sink_position} plus b ({shifts}; after a softcap), rows "
            f"renormalised, in {layers}{control}; KL: of the unedited model's predictions from the edited ones"
        )

    def setup(self) -> None:
        """Refuse a layer or head that the model does not have, and start the metrics of the table `questions`."""
        super().setup()
        require_layer(self.params.layer, self.model)
        if self.params.head is not None and self.params.layer is not None:
            n_heads = self.model.n_heads_in(self.params.layer)
            if self.params.head >= n_heads:
                raise InputError(
                    f"head is {self.params.head}, but {self.model.label} has heads 0 to {n_heads - 1}"
                    f"{f' in layer {self.params.layer}' if self.model.heads else ''}"
                )
        self.shifts = parse_shifts(self.params.shifts)
        #: Mean divergence of each text, in nats per predicted token, by condition and text index.
        self.divergences: dict[ConditionKey, dict[int, float]] = {}
        beside = self.params.beside and self.params.sink_position == 0
        if self.params.beside and not beside:
            self.warn(
                f"questions has no rows of bos-v and bos-mlp: these edit position 0, and the sink position is "
                f"{self.params.sink_position}"
            )
        sources = [
            ConditionSource("bos-v", BosV, BosVParams(seeds=0)),
            ConditionSource("bos-mlp", BosMlp, BosMlpParams(seeds=0)),
        ]
        absence = next(
            filter(None, (self._absence_of_values(layer) for layer in self.model.attention_layers)), None
        )
        if beside and absence is not None:
            self.warn(f"questions has no rows of bos-v: {absence}")
            del sources[0]
        self.inner = InnerMetrics(sources if beside else [], self.model, self.seed)

    def _absence_of_values(self, layer: int) -> str | None:
        """Return the reason why the layer has no point at its values, which bos-v edits."""
        return self.model.absence(in_layer(layer, "attn.hook_v"))

    @property
    def sink_position(self) -> int:
        """The key whose share of attention `hook_sink` has."""
        return self.params.sink_position

    def hooks(self) -> Sequence[str]:
        """Return the point of attention on the key, and those that select the layer of bos-mlp."""
        return [in_layer("{layer}", "attn.hook_sink"), *self.inner.hooks()]

    def update(self, layer: LayerView) -> None:
        """Store the attention on the key, its mean and its maximum over the later queries that see it."""
        from phaselens.attention import query_mean

        self.inner.update(layer)
        if "attn.hook_sink" not in layer:
            return
        sink, position = layer.float64("attn.hook_sink"), self.params.sink_position
        window = self.model.windows[layer.index or 0]
        last = None if window is None else position + window - 1
        later = sink[:, :, position + 1 : None if last is None else last + 1]
        real = layer.batch.real[:, None, position + 1 : position + 1 + later.shape[-1]].to(later.device)
        self.per_text.add(
            layer,
            mass=query_mean(sink, layer.batch.lengths_on(sink.device), first=position + 1, last=last),
            any_mass=((later != 0) & real).any(-1),
        )

    def merge(self, other: Metric[SinkRemovalParams]) -> None:
        """Merge another instance, with its divergences and its inner metrics."""
        super().merge(other)
        if isinstance(other, SinkRemoval):
            merge_nested(self.divergences, other.divergences)
            self.inner.merge(other.inner)

    def record(self, condition: Condition, outcome: TextOutcome) -> None:
        """Record the loss, and the mean divergence of the text's predictions."""
        super().record(condition, outcome)
        if outcome.divergence is not None and len(outcome.divergence):
            mean = float(outcome.divergence.mean())
            self.divergences.setdefault(condition.key, {})[outcome.index] = mean

    def conditions(self) -> Sequence[Condition]:
        """Return one condition per shift and scope, each with its controls, and those of bos-v and bos-mlp."""
        conditions = [
            condition
            for scope in self._scopes()
            for shift in self.shifts
            if shift != 0
            for condition in self._conditions_of(scope, shift)
        ]
        conditions += self.inner.conditions()
        for warning in self.inner.warnings:
            self.warn(warning)
        return conditions

    def _scopes(self) -> Iterator[Scope]:
        """Yield the sets of heads to edit, without layers in which no later query sees the key."""
        layers, windows = self.model.attention_layers, self.model.windows
        visible = tuple(layer for layer in layers if windows[layer] != 1)
        hidden = [str(layer) for layer in layers if windows[layer] == 1]
        position, params = self.params.sink_position, self.params
        if not layers:
            self.warn(f"no key is removed: {self.model.absence(in_layer(0, SCORES))}, as all layers")
            return
        if all(length <= position + 1 for length in self.per_text.lengths):
            self.warn(f"nothing to remove: no text has a token after position {position}")
            return
        if hidden:
            self.warn(
                f"nothing to remove in layer {', '.join(hidden)}: with a window of 1, no later query sees position "
                f"{position}"
            )
        if not visible:
            return
        yield Scope(ALL_LAYERS, visible)
        if params.at in ("layers", "heads"):
            yield from (Scope(EACH_LAYER, (layer,), layer) for layer in visible)
        if params.at == "heads":
            yield from (
                Scope(EACH_HEAD, (layer,), layer, head)
                for layer in visible
                for head in range(self.model.n_heads_in(layer))
            )
        if params.layer in visible:
            yield Scope(GIVEN, (params.layer,), params.layer, params.head)
        elif params.layer is not None and params.layer not in layers:
            self.warn(
                f"no key is removed in layer {params.layer}: layer {params.layer} is {self.model.kind_of(params.layer)}"
            )

    def _conditions_of(self, scope: Scope, shift: float) -> Iterator[Condition]:
        name = f"{scope.name}, b = {shift_text(shift)}"
        to = shift if shift == float("-inf") else ShiftScores(shift)
        heads = None if scope.head is None else [scope.head]
        position = self.params.sink_position

        def condition(name: str, keys: Any, **options: Any) -> Condition:
            edits = [Edit(in_layer(layer, SCORES), to, heads=heads, keys=keys) for layer in scope.layers]
            params = {"b": shift_text(shift), "sink_position": position}
            return Condition(name, edits, scope.layer, head=scope.head, params=params, **options)

        yield condition(name, [position])
        for seed in range(self.params.seeds):
            yield condition(f"other position: {name}", OtherKeys(position, seed), seed=seed, control_for=name)

    def compute(self) -> Mapping[str, Table]:
        """Return the tables of every ablation, the doses, and the table of the three questions."""
        tables = super().compute()
        self._warn_of_nothing_to_remove()
        by_condition = {
            (record["condition"], record["layer"], record["head"]): record
            for record in tables["conditions"].records()
        }
        return {
            **tables,
            "doses": self.table("doses", self._dose_rows(by_condition)),
            "questions": self.table("questions", self._question_rows(by_condition)),
        }

    def _warn_of_nothing_to_remove(self) -> None:
        """Warn of the heads that put no attention on the key in any text: their removal changes nothing."""
        import numpy as np

        if not self.per_text.layers("any_mass"):
            return
        any_mass = self.per_text.stack("any_mass")
        has_head = head_exists(self, any_mass.shape[1:])
        is_idle = (any_mass == 0).all(0)
        for layer in self.per_text.layers("any_mass"):
            if self.model.windows[layer] == 1 or not is_idle[layer].any():
                continue
            heads = np.flatnonzero(is_idle[layer])
            listed = (
                "any head" if is_idle[layer][has_head[layer]].all() else f"head {', '.join(map(str, heads))}"
            )
            self.warn(
                f"nothing to remove in layer {layer}, {listed}: no later query attends to position "
                f"{self.params.sink_position}; the ratio is 1"
            )

    def _dose_rows(self, by_condition: Mapping[Any, Mapping[str, Any]]) -> Iterator[TableRow]:
        n_texts = by_condition[BASELINE.name, None, None]["n_texts"]
        for scope in self._scopes():
            mass = self._mass(scope)
            for shift in sorted(self.shifts):
                name = f"{scope.name}, b = {shift_text(shift)}"
                site = (name, scope.name, scope.layer, scope.head, shift_text(shift))
                if shift == 0:
                    control_cells = (0.0 if self.params.seeds else None,) * 6
                    yield (*site, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, *control_cells, mass, n_texts)
                    continue
                record = by_condition[name, scope.layer, scope.head]
                control_name = f"other position: {name}"
                control = by_condition.get((control_name, scope.layer, scope.head), {})
                group = (control_name, scope.layer, scope.head)
                control_kl = self._divergence(group) if control else (None, None, None)
                yield (
                    *site, *(record[column] for column in ("delta_nats", "delta_low", "delta_high", "ratio")),
                    *self._divergence((name, scope.layer, scope.head)),
                    *(control.get(column) for column in ("delta_nats", "delta_low", "delta_high")), *control_kl,
                    mass, n_texts,
                )  # fmt: skip

    def _question_rows(self, by_condition: Mapping[Any, Mapping[str, Any]]) -> Iterator[TableRow]:
        names = [(self.name, f"{ALL_LAYERS}, b = {shift_text(min(self.shifts))}")]
        names += [
            (source.label, name)
            for source in self.inner.sources
            for name in dict.fromkeys(condition.name for condition in self.losses.conditions.values())
            if name.startswith(f"{source.label}: ")
        ]
        for metric, name in names:
            for (condition, layer, head), record in by_condition.items():
                if condition == name:
                    yield (
                        QUESTION_OF[metric], metric, name, layer,
                        *(record[column] for column in ("delta_nats", "delta_low", "delta_high", "ratio")),
                        *self._divergence((condition, layer, head)), record["n_texts"],
                    )  # fmt: skip

    def _mass(self, scope: Scope) -> float | None:
        """Return the attention on the key before the edit, mean over texts and the scope's heads."""
        mass = self.per_text.stack("mass")[:, list(scope.layers)]
        return mean_or_none(mass if scope.head is None else mass[..., scope.head])

    def _divergence(self, group: Any) -> tuple[float | None, float | None, float | None]:
        """Return the mean divergence over all predicted tokens with its interval; None where an edit did nothing."""
        import numpy as np

        from phaselens.uncertainty import compare_arms

        repeats = self.losses.repeats[group]
        if any(self.losses.no_effect_reason(repeat) for repeat in repeats):
            return None, None, None
        indices = self.losses.predicted_by_content
        by_repeat = np.array(
            [[self.divergences[repeat.key][index] for index in indices] for repeat in repeats]
        )
        comparison = compare_arms(
            by_repeat.mean(0),
            np.zeros((len(indices), 1)),
            n_predicted=self.losses.n_predicted(indices),
            seed=self.seed,
        )
        if comparison.difference is None:
            self.warn(f"{repeats[0].label}: kl is missing: {comparison.reasons['difference']}")
        return comparison.difference, comparison.ci_low, comparison.ci_high

    @classmethod
    def plot(cls, tables: Mapping[str, Table], figure: Figure) -> None:
        """Draw the loss by dose, one line per model, with that of another key dashed."""
        draw_doses(tables, figure)


@hookimpl
def phaselens_metrics() -> list[type[Metric[Any]] | str]:
    """Return the metrics in this file."""
    return [SinkRemoval]
