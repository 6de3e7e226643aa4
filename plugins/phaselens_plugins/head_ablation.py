"""Loss without each head, one at a time, and the order of heads by what they cost against what they look like.

A head that attends to a sink, or writes little, is called idle. Whether the model does without it is another question:
Sandoval-Segura et al. 2025 (arXiv:2504.03889) call heads dormant by the norm of their output relative to the layer's.
Here both answers are in one table, head by head, with the number of heads on which they agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phaselens.plugin import (
    BASELINE,
    CAUSAL_TABLES,
    CausalMetric,
    Condition,
    Display,
    Edit,
    InputError,
    LayerView,
    Metric,
    Params,
    Projection,
    Table,
    hookimpl,
    in_layer,
    param,
    with_adjusted_p,
)
from phaselens_plugins._causal import layer_ranges, parse_layers
from phaselens_plugins._cells import CellMoments
from phaselens_plugins._common import head_exists, layer_texts, store_by_text
from phaselens_plugins._head_means import MeanOfOthers
from phaselens_plugins._head_tables import (
    HEADS,
    LAYERS,
    RANKS,
    SUMMARY,
    HeadCosts,
    draw_heads,
    rank_rows,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

Z = "attn.hook_z"
NAMES = {"zero": "head := 0", "mean": "head := its mean"}
"""Name of the condition by the parameter `value`."""


@dataclass(frozen=True)
class HeadAblationParams(Params):
    """Parameters of the metric."""

    value: str = param(
        "zero",
        help="what replaces a head's output z at every position: zero, or its mean over the tokens of other texts",
        choices=("zero", "mean"),
    )
    layers: str = param("all", help="the layers: all, or numbers and ranges, such as 0,2-4")
    epsilon: float = param(
        0.001, help="a head whose removal adds less than this is idle by its loss", unit="nats/token"
    )
    output_share: float = param(
        0.5,
        help="a head whose output's norm is below this share of its layer's mean is idle by its output",
        unit="ratio",
        minimum=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        layer_ranges(self.layers)


class HeadAblation(CausalMetric[HeadAblationParams]):
    """Metric of the loss without each head, ranked against its sink score, its entropy and its output."""

    name = "head-ablation"
    version = "1"
    title = "heads removed"
    description = "loss without each head, against its sink score, entropy and output norm"
    citation = "output norms: Sandoval-Segura et al. 2025, arXiv:2504.03889"
    Params = HeadAblationParams
    tables = (*CAUSAL_TABLES, HEADS, LAYERS, RANKS, SUMMARY)
    display = Display(
        value="idle_by_loss",
        title="idle by loss",
        low="idle_low",
        high="idle_high",
        percent=True,
        also=(("idle_by_output", "by output"), ("both", "both"), ("both_expected", "by chance")),
        summary=(("idle_by_loss", "idle by loss"), ("idle_by_output", "by output"), ("both", "both")),
        by_head="output_share",
    )
    plots = True

    @classmethod
    def define(cls, params: HeadAblationParams) -> str:
        """State what replaces a head's output, and when it is idle."""
        value = {"zero": "0", "mean": "its mean over the tokens of other texts"}[params.value]
        layers = "all layers" if params.layers.strip() == "all" else f"layers {params.layers}"
        return (
            f"z of one head at a time := {value}, in {layers}; idle by loss: adds less than {params.epsilon:g} nats "
            f"per token; idle by output: ‖z·W_O‖ below {params.output_share:g} × the mean of the layer's heads"
        )

    def setup(self) -> None:
        """Refuse layers that the model does not have, and start with no sums and no projections."""
        selected = parse_layers(self.params.layers, self.model)
        self.layers = [layer for layer in selected if layer in self.model.attention_layers]
        other_layers = [layer for layer in selected if layer not in self.layers]
        if other_layers:
            kinds = ", ".join(f"layer {layer} is {self.model.kind_of(layer)}" for layer in other_layers)
            self.warn(f"no heads to remove: {kinds}")
        self.moments = CellMoments()
        self.projections: dict[int, tuple[Projection, Tensor] | None] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the projections, which refer to the model's modules and can be read again."""
        return {**vars(self), "projections": {}}

    def hooks(self) -> Sequence[str]:
        """Return the points of attention on position 0, entropy and head outputs, in the selected layers."""
        points = ("attn.hook_sink", "attn.hook_entropy", Z)
        return [in_layer(layer, point) for layer in self.layers for point in points]

    def update(self, layer: LayerView) -> None:
        """Store sink score, entropy and output norm of each head, and the sums of its outputs."""
        import torch

        from phaselens.attention import head_norms, normalised_entropy, sink_score

        index = layer.index or 0
        window = self.model.windows[index]
        projection = self._projection(layer)
        if self.params.value == "mean":
            self.moments.add(layer, {"z": Z})
        records = []
        for text in layer_texts(layer):
            z, n_tokens = text[Z], text.n_tokens
            missing = torch.full((self.model.n_heads_in(index),), torch.nan, dtype=torch.float64)
            sink, entropy = (
                layer.float64(f"attn.{point}")[text.index : text.index + 1, :, :n_tokens]
                for point in ("hook_sink", "hook_entropy")
            )
            normalised = normalised_entropy(entropy[0], window=window)
            has_choice = ~normalised[0].isnan()
            norms = missing
            if projection is not None:
                norms = head_norms(projection[0].multiplied(z), projection[1]).mean(0)
            values = {
                "sink": sink_score(sink, torch.tensor([n_tokens]), window=window)[0],
                "entropy": normalised[:, has_choice].mean(-1) if bool(has_choice.any()) else missing,
                "output": norms,
                "output_share": norms / norms.mean() if bool(norms.mean() > 0) else missing,
            }
            records.append(
                {
                    name: torch.where(value.isfinite(), value.cpu(), torch.nan).tolist()
                    for name, value in values.items()
                }
            )
        store_by_text(self, layer, records)

    def _projection(self, layer: LayerView) -> tuple[Projection, Tensor] | None:
        """Return the layer's output projection with its triangular factor, read once; None if it is refused."""
        from phaselens.attention import triangular

        index = layer.index or 0
        if index not in self.projections:
            try:
                projection = layer.projection("attn.W_O")
            except InputError as error:
                self.warn(f"output and output_share are missing in layer {index}: {error}")
                self.projections[index] = None
            else:
                self.projections[index] = projection, triangular(projection.weight)
        return self.projections[index]

    def merge(self, other: Metric[HeadAblationParams]) -> None:
        """Merge another instance, with its sums."""
        super().merge(other)
        if isinstance(other, HeadAblation):
            self.moments.merge(other.moments)

    def conditions(self) -> Sequence[Condition]:
        """Return one condition for each head; none if there are no other texts to take means from."""
        replacements: Mapping[int, MeanOfOthers] = {}
        if self.params.value == "mean":
            if len(self.moments.usable_texts) < 2:
                self.warn(
                    "no head is removed: its mean is taken over texts other than the edited one; use two texts or "
                    "more, of different content and finite activations"
                )
                return []
            replacements = {layer: MeanOfOthers.of_layer(self.moments, (layer, "z")) for layer in self.layers}
        return [
            Condition(
                NAMES[self.params.value],
                [Edit(in_layer(layer, Z), replacements.get(layer, 0.0), heads=[head])],
                layer,
                head=head,
                params={"value": self.params.value},
            )
            for layer in self.layers
            for head in range(self.model.n_heads_in(layer))
        ]

    def compute(self) -> Mapping[str, Table]:
        """Return the tables of every causal metric, the heads, the idle shares of layers, and the rank correlations."""
        self.projections.clear()
        tables = super().compute()
        if not self.layers:
            return {
                **tables,
                **{name: self.table(name, []) for name in ("heads", "layers", "ranks", "summary")},
            }
        costs = self._costs(tables["conditions"])
        for reason in costs.reasons():
            self.warn(reason)
        ranks = rank_rows(costs, self.seed, self.warn)
        return {
            **tables,
            "heads": self.table("heads", with_adjusted_p(costs.head_rows(), HEADS.index("p_value"))),
            "layers": self.table("layers", costs.layer_rows()),
            "ranks": self.table("ranks", with_adjusted_p(ranks, RANKS.index("p_value"))),
            "summary": self.table("summary", costs.summary_rows()),
        }

    def _costs(self, conditions: Table) -> HeadCosts:
        """Return costs and appearance of all heads, with the texts in the order of their content."""
        import numpy as np

        losses, n_heads = self.losses, self.model.n_heads
        indices = losses.predicted_by_content
        records = {(record["layer"], record["head"]): record for record in conditions.records()}
        base = losses.by_text(BASELINE, indices)
        changes = np.full((len(indices), len(self.layers), n_heads), np.nan)
        for condition in losses.effective_conditions:
            assert condition.layer is not None
            row = self.layers.index(condition.layer)
            changes[:, row, condition.head] = losses.by_text(condition, indices) - base
        rank = {index: position for position, index in enumerate(sorted(losses.names))}
        order = [rank[index] for index in indices]
        looks = {
            name: self.per_text.stack(name)[order][:, self.layers]
            for name in ("sink", "entropy", "output", "output_share")
        }
        return HeadCosts(
            layers=self.layers,
            records=[[records.get((layer, head)) for head in range(n_heads)] for layer in self.layers],
            changes=changes,
            looks=looks,
            exists=head_exists(self, (self.model.n_layers, n_heads))[self.layers],
            n_predicted=losses.n_predicted(indices),
            epsilon=self.params.epsilon,
            output_share=self.params.output_share,
            seed=self.seed,
        )

    @classmethod
    def plot(cls, tables: Mapping[str, Table], figure: Figure) -> None:
        """Draw the cost of each head against its sink score, entropy and output share, one colour per model."""
        draw_heads(tables, figure)


@hookimpl
def phaselens_metrics() -> list[type[Metric[Any]] | str]:
    """Return the metrics in this file."""
    return [HeadAblation]
