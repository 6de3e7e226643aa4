"""The MLP's output at position 0 removed and queries and keys disturbed, each alone and both together.

If the two disturb the same thing, both together cost less than the sum of the two; if each makes up for the other, they
cost more. The interaction says which, text by text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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
    interval_help,
    param,
)
from phaselens_plugins._inner import Asked, Inner
from phaselens_plugins.bos_mlp import BosMlp, BosMlpParams
from phaselens_plugins.qk_disruption import QkChoice, QkDisruption, QkParams

DISRUPTIONS = ("massive", "top-1", "top-1-mean", "study-top-1")
_INTERVAL = interval_help(paired=True)
SUM = "sum of each alone"
_OF_CONTRASTS = ("layer", "interaction", "ci_low", "ci_high", "p_value", "d_z", "n_texts")
_SHOWN = {name: name for name in ("ci_low", "ci_high", "p_value", "d_z")} | {"difference": "interaction"}
"""What the table shows of a comparison, and under which name."""


@dataclass(frozen=True)
class CombinedParams(QkChoice):
    """What the metric can be asked for."""

    layer: int | None = param(
        None, help="the layer whose MLP is removed at position 0; none: the one that writes it", minimum=0
    )
    disruption: str = param(
        "top-1",
        help="what is done to queries and keys: massive or largest cells := 0, largest := mean, all or massive ones",
        choices=DISRUPTIONS,
    )


class Arms(NamedTuple):
    """The conditions of one comparison."""

    bos: Condition
    qk: Condition
    both: Condition


class Combined(CausalMetric[CombinedParams]):
    """BOS's MLP output and large cells of queries and keys: each alone, both, and what is more than the sum."""

    name = "combined"
    version = "1"
    title = "MLP output at BOS and queries and keys, together"
    description = (
        "the loss with MLP output at BOS removed and queries and keys disturbed, each alone and both"
    )
    citation = "arXiv:2510.06477; arXiv:2502.01563; github.com/DavidDemitriAfrica/drope-activations"
    Params = CombinedParams
    tables = (
        *CAUSAL_TABLES,
        TableSpec(
            "interactions",
            (
                Column("condition", str, None, "both together"),
                Column("layer", int, "index", "whose MLP is removed at position 0, 0-based"),
                Column("delta_bos_mlp", float, "nats/token", "what the MLP's removal alone adds to the loss"),
                Column("delta_qk", float, "nats/token", "what the disruption alone adds to it"),
                Column("delta_both", float, "nats/token", "what both add to it"),
                Column(
                    "interaction",
                    float,
                    "nats/token",
                    "delta_both − delta_bos_mlp − delta_qk, mean over all predicted tokens, as each of them",
                ),
                Column("ci_low", float, "nats/token", _INTERVAL),
                Column("ci_high", float, "nats/token", _INTERVAL),
                Column(
                    "p_value",
                    float,
                    "probability",
                    "of such an interaction by chance: signs of the texts' interactions swapped",
                ),
                Column(
                    "d_z",
                    float,
                    "sd",
                    "interaction over the sd (n − 1) of the texts' interactions, both weighted by predicted tokens",
                ),
                Column("n_texts", int, "texts", "texts with a predicted token"),
            ),
            "more than the sum of both (above 0), or less",
        ),
    )

    @classmethod
    def define(cls, params: CombinedParams) -> str:
        """What is done alone and together."""
        where = "the layer that writes its norm" if params.layer is None else f"layer {params.layer}"
        return (
            f"MLP output at position 0 := 0 in {where}; {params.disruption} of queries and keys as in qk-disruption; "
            "and both. Interaction: both − one − the other, in nats"
        )

    def setup(self) -> None:
        """The two metrics that find out what to change."""
        params = self.params
        bos = BosMlpParams(layer=params.layer, seeds=0)
        choice = {spec.name: getattr(params, spec.name) for spec in QkChoice.specs()}
        qk = QkParams(conditions=params.disruption, **choice)
        self.inner = Inner(
            [Asked("bos-mlp", BosMlp, bos), Asked("qk-disruption", QkDisruption, qk)], self.model, self.seed
        )

    def hooks(self) -> Sequence[str]:
        """What the two look at."""
        return self.inner.hooks()

    def update(self, layer: LayerView) -> None:
        """Hand it to both."""
        self.inner.update(layer)

    def merge(self, other: Metric[CombinedParams]) -> None:
        """Also what the two saw."""
        super().merge(other)
        if isinstance(other, Combined):
            self.inner.merge(other.inner)

    def conditions(self) -> Sequence[Condition]:
        """Each alone, and both for every layer that is meant."""
        bos, qk = (list(metric.conditions()) for metric in self.inner.metrics)
        for warning in self.inner.warnings:
            self.warn(warning)
        if self.params.layer is not None:
            bos = [one for one in bos if one.layer == self.params.layer]
        both = [
            Condition(f"{one.name} + {other.name}", [*one.edits, *other.edits], one.layer)
            for one in bos
            for other in qk
        ]
        return [*bos, *qk, *both]

    def compute(self) -> Mapping[str, Table]:
        """The tables of every causal metric, and the interactions, which are also contrasts: both less the sum."""
        found = super().compute()
        interactions = self.table("interactions", self._interactions())
        contrasts = [
            (one["condition"], SUM, *(one[name] for name in _OF_CONTRASTS), 1)
            for one in interactions.records()
        ]
        return {
            **found,
            "contrasts": self.table("contrasts", [*found["contrasts"].rows, *contrasts]),
            "interactions": interactions,
        }

    def _arms(self) -> Iterator[Arms]:
        """Comparisons of which all three conditions did what they say."""
        sound = self.losses.working
        for bos in sound:
            for qk in sound:
                for both in sound:
                    if both.name == f"{bos.name} + {qk.name}" and both.layer == bos.layer:
                        yield Arms(bos, qk, both)

    def _interactions(self) -> Iterator[tuple[Any, ...]]:
        from phaselens.uncertainty import compare_arms, compare_conditions

        indices = [index for index in self.losses.by_content if self.losses.predicts(index)]
        n_predicted = self.losses.n_predicted(indices)
        base = self.losses.of(BASELINE, indices)
        for arms in self._arms():
            bos, qk, both = (self.losses.of(one, indices) for one in arms)
            alone = [
                one.delta_nats
                for one in compare_conditions(base, list(zip(bos, qk, both, strict=True)), n_predicted)
            ]
            found = compare_arms(both + base, (bos + qk)[:, None], n_predicted=n_predicted, seed=self.seed)
            for name, reason in found.reasons.items():
                if name in _SHOWN:
                    self.warn(f"interaction of {arms.both.name}: {_SHOWN[name]} is null: {reason}")
            yield (
                arms.both.name, arms.both.layer, *alone, found.difference, found.ci_low, found.ci_high, found.p_value,
                found.d_z, found.n_texts,
            )  # fmt: skip


@hookimpl
def phaselens_metrics() -> list[type[Metric[Any]] | str]:
    """The metrics in this file."""
    return [Combined]
