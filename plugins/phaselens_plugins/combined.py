"""Loss with the MLP's output at position 0 removed and queries and keys disturbed: each alone, and both together.

If the two disturb the same mechanism, both together cost less than the sum of the two; if each compensates for the
other, they cost more. The interaction, computed text by text, distinguishes the two cases.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

from phaselens.plugin import (
    BASELINE,
    CAUSAL_TABLES,
    CausalMetric,
    Column,
    Condition,
    LayerView,
    Metric,
    Table,
    TableSpec,
    hookimpl,
    param,
)
from phaselens_plugins._causal import paired_interval_columns
from phaselens_plugins._common import TableRow
from phaselens_plugins._inner import ConditionSource, InnerMetrics
from phaselens_plugins.bos_mlp import BosMlp, BosMlpParams
from phaselens_plugins.qk_disruption import QkDisruption, QkParams, QkSelection

DISRUPTIONS = ("massive", "top-1", "top-1-mean", "study-top-1")
SUM = "sum of each alone"
#: Columns of `interactions` that the table `contrasts` repeats after the layer.
_CONTRAST_COLUMNS = ("interaction", "ci_low", "ci_high", "p_value", "d_z", "n_texts")
_COLUMN_OF_FIELD = {name: name for name in ("ci_low", "ci_high", "p_value", "d_z")} | {
    "difference": "interaction"
}
"""Column of `interactions` for each field of a comparison."""


@dataclass(frozen=True)
class CombinedParams(QkSelection):
    """Parameters of the metric."""

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


class Arms(NamedTuple):
    """The three conditions of one interaction."""

    bos: Condition
    qk: Condition
    joint: Condition


class Combined(CausalMetric[CombinedParams]):
    """Metric of the loss with MLP output at BOS and large query and key cells removed: each, both, interaction."""

    name = "combined"
    partial_layers = True  # the metric of the MLP reads layers without attention too
    version = "1"
    title = "MLP output at BOS and queries and keys, together"
    description = (
        "loss with the MLP output at BOS removed and queries and keys disturbed, each alone and both"
    )
    citation = "arXiv:2510.06477; arXiv:2502.01563; github.com/DavidDemitriAfrica/drope-activations"
    Params = CombinedParams
    tables = (
        *CAUSAL_TABLES,
        TableSpec(
            "interactions",
            (
                Column("condition", str, None, "the condition of both together"),
                Column("layer", int, "index", "the layer whose MLP output is removed at position 0, 0-based"),
                Column("delta_bos_mlp", float, "nats/token", "change of the loss by the MLP's removal alone"),
                Column("delta_qk", float, "nats/token", "change of the loss by the disruption alone"),
                Column("delta_both", float, "nats/token", "change of the loss by both"),
                Column(
                    "interaction",
                    float,
                    "nats/token",
                    "delta_both − delta_bos_mlp − delta_qk; all four are means over all predicted tokens",
                ),
                *paired_interval_columns("nats/token", "ci"),
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
                Column("n_texts", int, "texts", "texts with a predicted token"),
            ),
            "cost of both beyond the sum of each alone (above 0), or below it",
        ),
    )

    @classmethod
    def define(cls, params: CombinedParams) -> str:
        """State the two edits and the interaction."""
        layer = "the layer that writes its norm" if params.layer is None else f"layer {params.layer}"
        return (
            f"MLP output at position 0 := 0 in {layer}; {params.disruption} of queries and keys as in qk-disruption; "
            "and both. Interaction: both − one − the other, in nats"
        )

    def setup(self) -> None:
        """Start the two inner metrics, which select the layer and the cells."""
        params = self.params
        bos_params = BosMlpParams(layer=params.layer, seeds=0)
        selection = {spec.name: getattr(params, spec.name) for spec in QkSelection.specs()}
        qk_params = QkParams(conditions=params.disruption, **selection)
        self.inner = InnerMetrics(
            [
                ConditionSource("bos-mlp", BosMlp, bos_params),
                ConditionSource("qk-disruption", QkDisruption, qk_params),
            ],
            self.model,
            self.seed,
        )

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

    def conditions(self) -> Sequence[Condition]:
        """Return the conditions of each edit alone, and of both together for every selected layer."""
        bos_conditions, qk_conditions = (list(metric.conditions()) for metric in self.inner.metrics)
        for warning in self.inner.warnings:
            self.warn(warning)
        if self.params.layer is not None:
            bos_conditions = [bos for bos in bos_conditions if bos.layer == self.params.layer]
        joint_conditions = [
            Condition(_joint_name(bos, qk), [*bos.edits, *qk.edits], bos.layer)
            for bos in bos_conditions
            for qk in qk_conditions
        ]
        return [*bos_conditions, *qk_conditions, *joint_conditions]

    def compute(self) -> Mapping[str, Table]:
        """Return the tables of every causal metric, and the interactions.

        Interactions are also contrasts, of both together against the sum of each alone.
        """
        tables = super().compute()
        interactions = self.table("interactions", self._interaction_rows())
        contrasts = [
            # The two edits have no head in common.
            (
                record["condition"],
                SUM,
                record["layer"],
                None,
                *(record[name] for name in _CONTRAST_COLUMNS),
                1,
            )
            for record in interactions.records()
        ]
        return {
            **tables,
            "contrasts": self.table("contrasts", [*tables["contrasts"].rows, *contrasts]),
            "interactions": interactions,
        }

    def _arms(self) -> Iterator[Arms]:
        """Yield the comparisons whose three conditions all took effect."""
        working = {
            (condition.name, condition.layer): condition for condition in self.losses.effective_conditions
        }
        for bos, qk in product(working.values(), repeat=2):
            joint = working.get((_joint_name(bos, qk), bos.layer))
            if joint is not None:
                yield Arms(bos, qk, joint)

    def _interaction_rows(self) -> Iterator[TableRow]:
        from phaselens.uncertainty import compare_arms, compare_conditions

        indices = [index for index in self.losses.by_content if self.losses.has_predictions(index)]
        n_predicted = self.losses.n_predicted(indices)
        base = self.losses.by_text(BASELINE, indices)
        for arms in self._arms():
            bos, qk, joint = (self.losses.by_text(condition, indices) for condition in arms)
            deltas = [
                comparison.delta_nats
                for comparison in compare_conditions(
                    base, list(zip(bos, qk, joint, strict=True)), n_predicted
                )
            ]
            comparison = compare_arms(
                joint + base, (bos + qk)[:, None], n_predicted=n_predicted, seed=self.seed
            )
            for field, reason in comparison.reasons.items():
                if field in _COLUMN_OF_FIELD:
                    self.warn(
                        f"interaction of {arms.joint.name}: {_COLUMN_OF_FIELD[field]} is missing: {reason}"
                    )
            yield (
                arms.joint.name, arms.joint.layer, *deltas, comparison.difference, comparison.ci_low,
                comparison.ci_high, comparison.p_value, comparison.d_z, comparison.n_texts,
            )  # fmt: skip


def _joint_name(bos: Condition, qk: Condition) -> str:
    """Return the name of the condition that applies both edits."""
    return f"{bos.name} + {qk.name}"


@hookimpl
def phaselens_metrics() -> list[type[Metric[Any]] | str]:
    """Return the metrics in this file."""
    return [Combined]
