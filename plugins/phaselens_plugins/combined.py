"""Loss under two or more conditions, each alone and together: by default the MLP at BOS and queries and keys.

If conditions disturb the same mechanism, all together cost less than the sum of each alone; if each compensates for
the others, they cost more. The interaction, computed text by text, distinguishes the two cases. With three conditions
or more, the part that no smaller combination explains is the interaction of that order: a sum with alternating signs
over all combinations (inclusion and exclusion).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import TYPE_CHECKING, Any

from phaselens.plugin import (
    ADJUSTED_P,
    BASELINE,
    CAUSAL_TABLES,
    CausalMetric,
    Column,
    Condition,
    ConditionKey,
    InputError,
    LayerView,
    Metric,
    Table,
    TableSpec,
    hookimpl,
    kind_of,
    param,
    with_adjusted_p,
)
from phaselens_plugins._causal import paired_interval_columns
from phaselens_plugins._common import TableRow
from phaselens_plugins._inner import CONDITIONS_HELP, ConditionSource, InnerMetrics, parse_sources
from phaselens_plugins.bos_mlp import BosMlp, BosMlpParams
from phaselens_plugins.qk_disruption import QkDisruption, QkParams, QkSelection

if TYPE_CHECKING:
    import numpy as np

DISRUPTIONS = ("massive", "top-1", "top-1-mean", "study-top-1")
SUM = "sum of each alone"
MAX_SOURCES = 5
"""Each further metric doubles the number of combinations."""
#: Columns of `interactions` that the table `contrasts` repeats.
_CONTRAST_COLUMNS = ("layer", "head", "interaction", "ci_low", "ci_high", "p_value", "d_z", "n_texts")
_COLUMN_OF_FIELD = {name: name for name in ("ci_low", "ci_high", "p_value", "d_z")} | {
    "difference": "interaction"
}
"""Column of `interactions` for each field of a comparison."""
_NATS = "nats/token"
_SITE = (
    Column(
        "layer", int, "index", "the layer of the conditions, 0-based; missing if they have several or none"
    ),
    Column("head", int, "index", "the head of the conditions, 0-based; missing if they have several or none"),
)


@dataclass(frozen=True)
class CombinedParams(QkSelection):
    """Parameters of the metric."""

    conditions: str = param(
        "",
        help=f"two or more {CONDITIONS_HELP}; by default bos-mlp and qk-disruption, as the other parameters say",
    )
    layer: int | None = param(
        None,
        help="the layer whose MLP output is removed at position 0; none: the write layer of bos-mlp",
        minimum=0,
    )
    disruption: str = param(
        "top-1",
        help="the edit of queries and keys: massive cells := 0; each head's largest cell := 0, or := its mean, "
        "or := its mean where massive in its head",
        choices=DISRUPTIONS,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.conditions.strip():
            return
        for spec in self.specs():
            if spec.name != "conditions" and getattr(self, spec.name) != spec.default:
                raise InputError(
                    f"{spec.name} belongs to the default conditions; write it behind the name of its metric in "
                    f"conditions, as in bos-mlp layer=1"
                )


def custom_sources(text: str) -> list[ConditionSource]:
    """Return the metrics whose conditions are combined.

    Raises:
        InputError: for fewer than two or more than `MAX_SOURCES` metrics, and for a metric that cannot be combined.
    """
    sources = parse_sources(text)
    if not 2 <= len(sources) <= MAX_SOURCES:
        raise InputError(
            f"conditions: {len(sources)} metric{'s' * (len(sources) != 1)}; name 2 to {MAX_SOURCES}, separated by "
            "semicolons, such as bos-v; sink-removal shifts=-inf"
        )
    for source in sources:
        if issubclass(source.metric_class, Combined):
            raise InputError(
                "conditions: combined cannot be combined with itself; name the metrics that it combines"
            )
        if kind_of(source.metric_class) == "task":
            raise InputError(
                f"conditions: {source.metric_class.name} measures on prompts of its own; name the metrics whose "
                "conditions it runs"
            )
    return sources


@dataclass(frozen=True)
class Combination:
    """Conditions that are run together as `joint`."""

    members: tuple[Condition, ...]

    @property
    def joint(self) -> Condition:
        """The condition with the edits of all members, one after the other.

        Its layer and head are those that all members with one share; with several, the members' labels name them.
        """
        layers = {member.layer for member in self.members if member.layer is not None}
        heads = {member.head for member in self.members if member.head is not None}
        has_one_site = len(layers) <= 1 and len(heads) <= 1
        return Condition(
            " + ".join(member.name if has_one_site else member.label for member in self.members),
            [edit for member in self.members for edit in member.edits],
            next(iter(layers), None) if has_one_site else None,
            head=next(iter(heads), None) if has_one_site else None,
        )

    def subsets(self) -> Iterator[Combination]:
        """Yield the combinations of one or more members, this one last."""
        for size in range(1, len(self.members) + 1):
            yield from map(Combination, combinations(self.members, size))

    @property
    def condition(self) -> Condition:
        """The condition that is run: the member itself if it is alone."""
        return self.members[0] if len(self.members) == 1 else self.joint


class Combined(CausalMetric[CombinedParams]):
    """Metric of the loss under two or more conditions: each alone, their combinations, and their interaction."""

    name = "combined"
    partial_layers = True  # the metric of the MLP reads layers without attention too
    version = "2"
    title = "conditions together"
    description = "loss under two or more conditions, each alone and together, and their interaction"
    citation = "arXiv:2510.06477; arXiv:2502.01563; github.com/DavidDemitriAfrica/drope-activations"
    Params = CombinedParams
    tables = (
        *CAUSAL_TABLES,
        TableSpec(
            "interactions",
            (
                Column("condition", str, None, "the condition of all together"),
                *_SITE,
                Column("n_conditions", int, "conditions", "conditions that it combines"),
                Column("delta_sum", float, _NATS, "sum of the changes of the loss by each condition alone"),
                Column("delta_together", float, _NATS, "change of the loss by all conditions together"),
                Column(
                    "interaction",
                    float,
                    _NATS,
                    "delta_together − delta_sum; all are means over all predicted tokens",
                ),
                *paired_interval_columns(_NATS, "ci"),
                Column(
                    "p_value",
                    float,
                    "probability",
                    "two-sided p of the interaction, from random sign flips of texts",
                ),
                Column(
                    "d_z",
                    float,
                    "sd",
                    "interaction over the sd (n − 1) of the texts' interactions, both weighted by predicted tokens",
                ),
                Column(
                    "of_this_order",
                    float,
                    _NATS,
                    "the part of the interaction that no combination of fewer conditions explains; with two, all of it",
                ),
                *paired_interval_columns(_NATS, "order"),
                Column("n_texts", int, "texts", "texts with a predicted token"),
                *ADJUSTED_P,
            ),
            "cost of all together beyond the sum of each alone (above 0), or below it",
        ),
        TableSpec(
            "members",
            (
                Column("condition", str, None, "the condition of all together, as in `interactions`"),
                *_SITE,
                Column("member", str, None, "one of its conditions"),
                Column("member_layer", int, "index", "the layer of that condition, 0-based"),
                Column("member_head", int, "index", "the head of that condition, 0-based"),
                Column("delta_nats", float, _NATS, "change of the loss by that condition alone"),
            ),
            "one row per combination and condition in it",
        ),
    )

    @classmethod
    def define(cls, params: CombinedParams) -> str:
        """State the conditions and the interaction."""
        interaction = "Interaction: all together minus the sum of each alone, in nats"
        if params.conditions.strip():
            return (
                f"conditions of {params.conditions.strip()}, each alone, and all combinations of one from each. "
                f"{interaction}"
            )
        layer = "the layer that writes its norm" if params.layer is None else f"layer {params.layer}"
        return (
            f"MLP output at position 0 := 0 in {layer}; {params.disruption} of queries and keys as in qk-disruption; "
            f"and both. {interaction}"
        )

    def setup(self) -> None:
        """Start the inner metrics, which select layers and cells."""
        self.inner = InnerMetrics(self._sources(), self.model, self.seed)
        #: Keys of the conditions of each combination, the largest ones only; `conditions` sets it.
        self.members: list[tuple[ConditionKey, ...]] = []

    def _sources(self) -> list[ConditionSource]:
        params = self.params
        if params.conditions.strip():
            return custom_sources(params.conditions)
        selection = {spec.name: getattr(params, spec.name) for spec in QkSelection.specs()}
        qk_params = QkParams(conditions=params.disruption, **selection)
        return [
            ConditionSource("bos-mlp", BosMlp, BosMlpParams(layer=params.layer, seeds=0)),
            ConditionSource("qk-disruption", QkDisruption, qk_params),
        ]

    @property
    def sink_position(self) -> int:
        """The inner metrics' sink position."""
        return self.inner.sink_position

    @property
    def n_distances(self) -> int:
        """The inner metrics' number of distances."""
        return self.inner.n_distances

    def hooks(self) -> Sequence[str]:
        """Return the inner metrics' hook points."""
        return self.inner.hooks()

    def update(self, layer: LayerView) -> None:
        """Forward the layer to the inner metrics."""
        self.inner.update(layer)

    def merge(self, other: Metric[CombinedParams]) -> None:
        """Merge another instance, with its inner metrics."""
        super().merge(other)
        if isinstance(other, Combined):
            self.inner.merge(other.inner)
            self.members = self.members or other.members

    def conditions(self) -> Sequence[Condition]:
        """Return the conditions of each metric alone, without controls, and the combinations of one from each."""
        is_custom = bool(self.params.conditions.strip())
        by_source: list[list[Condition]] = []
        for source, metric in zip(self.inner.sources, self.inner.metrics, strict=True):
            conditions = [condition for condition in metric.conditions() if condition.control_for is None]
            if not is_custom and self.params.layer is not None and source.metric_class is BosMlp:
                conditions = [condition for condition in conditions if condition.layer == self.params.layer]
            if is_custom:
                conditions = [source.named(condition) for condition in conditions]
            if not conditions:
                self.warn(
                    f"nothing is combined: {source.label} has no condition for this model and these texts"
                )
            by_source.append(conditions)
        for warning in self.inner.warnings:
            self.warn(warning)
        self.members = [tuple(member.key for member in members) for members in product(*by_source)]
        run = {condition.key: condition for conditions in by_source for condition in conditions}
        for members in product(*by_source):
            for combination in Combination(members).subsets():
                condition = combination.condition
                run.setdefault(condition.key, condition)
        return list(run.values())

    def compute(self) -> Mapping[str, Table]:
        """Return the tables of every causal metric, and the interactions.

        Interactions are also contrasts, of all together against the sum of each alone.
        """
        tables = super().compute()
        delta_of = {
            (record["condition"], record["layer"], record["head"]): record["delta_nats"]
            for record in tables["conditions"].records()
        }
        combinations_run = list(self._combinations())
        p_value = self.spec("interactions").index("p_value")
        interaction_rows = with_adjusted_p(map(self._interaction, combinations_run), p_value)
        interactions = self.table("interactions", interaction_rows)
        contrasts = [
            (record["condition"], SUM, *(record[name] for name in _CONTRAST_COLUMNS), 1)
            for record in interactions.records()
        ]
        # Adjusted anew: the interactions are contrasts too.
        of_controls = [row[: -len(ADJUSTED_P)] for row in tables["contrasts"].rows]
        adjusted_contrasts = with_adjusted_p(
            [*of_controls, *contrasts], self.spec("contrasts").index("p_value")
        )
        members = [
            (*combination.joint.group, *member.group, delta_of[member.group])
            for combination in combinations_run
            for member in combination.members
        ]
        return {
            **tables,
            "contrasts": self.table("contrasts", adjusted_contrasts),
            "interactions": interactions,
            "members": self.table("members", members),
        }

    def _combinations(self) -> Iterator[Combination]:
        """Yield the combinations of two or more conditions of which all subsets took effect, small ones first."""
        working = {condition.key: condition for condition in self.losses.effective_conditions}
        combinations_run: dict[Any, Combination] = {}
        for keys in self.members:
            if all(key in working for key in keys):
                for subset in Combination(tuple(working[key] for key in keys)).subsets():
                    combinations_run.setdefault(subset.condition.key, subset)
        for combination in sorted(combinations_run.values(), key=lambda candidate: len(candidate.members)):
            is_complete = all(subset.condition.key in working for subset in combination.subsets())
            if len(combination.members) > 1 and is_complete:
                yield combination

    def _interaction(self, combination: Combination) -> TableRow:
        """Return the row of `interactions` of one combination."""
        from phaselens.uncertainty import compare_arms, compare_conditions

        indices = self.losses.predicted_by_content
        n_predicted = self.losses.n_predicted(indices)
        base = self.losses.by_text(BASELINE, indices)
        alone = [self.losses.by_text(member, indices) for member in combination.members]
        joint = combination.joint
        together = self.losses.by_text(joint, indices)
        total = sum(alone, start=0.0 * base)
        n = len(alone)
        deltas = [
            comparison.delta_nats
            for comparison in compare_conditions(
                base, list(zip(total - (n - 1) * base, together, strict=True)), n_predicted
            )
        ]
        comparison = compare_arms(
            together + (n - 1) * base, total[:, None], n_predicted=n_predicted, seed=self.seed
        )
        for field, reason in comparison.reasons.items():
            if field in _COLUMN_OF_FIELD:
                self.warn(f"interaction of {joint.name}: {_COLUMN_OF_FIELD[field]} is missing: {reason}")
        positive, negative = self._signed_sums(combination, indices)
        of_order = compare_arms(positive, negative[:, None], n_predicted=n_predicted, seed=self.seed)
        return (
            *joint.group, n, *deltas, comparison.difference, comparison.ci_low, comparison.ci_high,
            comparison.p_value, comparison.d_z, of_order.difference, of_order.ci_low, of_order.ci_high,
            comparison.n_texts,
        )  # fmt: skip

    def _signed_sums(self, combination: Combination, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return the sums of losses [text] that inclusion and exclusion add and subtract; their difference is the
        interaction of this order."""
        n, base = len(combination.members), self.losses.by_text(BASELINE, indices)
        sums = {0: 0.0 * base, 1: 0.0 * base}
        sums[n % 2] = sums[n % 2] + base
        for subset in combination.subsets():
            parity = (n - len(subset.members)) % 2
            sums[parity] = sums[parity] + self.losses.by_text(subset.condition, indices)
        return sums[0], sums[1]


@hookimpl
def phaselens_metrics() -> list[type[Metric[Any]] | str]:
    """Return the metrics in this file."""
    return [Combined]
