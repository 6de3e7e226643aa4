"""Loss with massive values of queries and keys overwritten in all layers, and with other cells as controls.

Jin et al. 2025 (arXiv:2502.01563) disturb massive values and compare with the smallest cells. Here cells, and the
values written into them, come from clean passes over other texts than those on which they are tested. Each control is
compared with the condition that it controls for, text by text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from phaselens.plugin import (
    CAUSAL_TABLES,
    CausalMetric,
    Column,
    Condition,
    Edit,
    InputError,
    LayerView,
    Metric,
    Params,
    Table,
    TableSpec,
    hookimpl,
    in_layer,
    param,
)
from phaselens_plugins._cells import CellMoments, Folds, OverwriteCells
from phaselens_plugins._common import TableRow
from phaselens_plugins._recipes import RECIPES, CellPlan, SelectionRule

POINTS = {
    "post": {"q": "attn.hook_rot_q", "k": "attn.hook_rot_k"},
    "pre": {"q": "attn.hook_q", "k": "attn.hook_k"},
}
MATCH_WARNING = 0.1
"""Relative difference of Σ M² in any layer and tensor above which a matched control gives a warning."""
_SHARE = "share of Σ M²"


@dataclass(frozen=True)
class QkSelection(Params):
    """Parameters that determine the cells of queries and keys, and the texts they are selected on."""

    tensors: str = param("both", help="queries, keys or both", choices=("q", "k", "both"))
    rotation: str = param(
        "post",
        help="queries and keys after the rotation (post), or before it, as projected (pre)",
        choices=("post", "pre"),
    )
    multiple: float = param(5.0, help="a cell is massive above this many times the mean cell", minimum=0)
    mean: str = param(
        "global",
        help="the mean cell of `multiple`: over all cells of a tensor (global), or over each head's (per_head)",
        choices=("global", "per_head"),
    )
    folds: int = param(
        2, help="number of folds of texts; the cells of a fold are selected on the other folds", minimum=2
    )


@dataclass(frozen=True)
class QkParams(QkSelection):
    """Parameters of the metric."""

    conditions: str = param(
        "massive,random-count,random-norm,top-1,smallest,top-1-random,top-1-norm,top-1-mean",
        help=f"the conditions, separated by commas: {', '.join(RECIPES)}; or all",
    )
    seeds: int = param(3, help="repeats of each random control", minimum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self._names():
            if name not in RECIPES:
                raise InputError(
                    f"conditions has {name!r}; give all, or some of {', '.join(RECIPES)}, separated by commas"
                )

    @property
    def recipe_names(self) -> list[str]:
        """Names of the conditions, in the order of `RECIPES`, with those that they are controls for."""
        names = set(self._names())
        names |= {treated for name in names if (treated := RECIPES[name].control_for) is not None}
        return [name for name in RECIPES if name in names]

    def _names(self) -> list[str]:
        """Return the names as the user wrote them."""
        if self.conditions.strip() == "all":
            return list(RECIPES)
        return [name.strip() for name in self.conditions.split(",")]


class QkDisruption(CausalMetric[QkParams]):
    """Metric of the loss with massive or largest cells of queries and keys overwritten in every layer."""

    name = "qk-disruption"
    version = "1"
    title = "massive queries and keys overwritten"
    description = "loss without massive values of queries and keys, and without other values as controls"
    citation = "Jin et al. 2025, arXiv:2502.01563; github.com/DavidDemitriAfrica/drope-activations"
    Params = QkParams
    tables = (
        *CAUSAL_TABLES,
        TableSpec(
            "dimensions",
            (
                Column("condition", str, None, "the condition's name"),
                Column("layer", int, "index", "0-based"),
                Column("tensor", str, None, "q or k"),
                Column(
                    "fold",
                    int,
                    "index",
                    "the fold of the edited texts; cells are selected on the other folds",
                ),
                Column("n_cells", float, "cells", "overwritten cells (head × dimension), mean over seeds"),
                Column("fraction", float, "share of cells", "n_cells / number of cells of the tensor"),
                Column("norm_share", float, _SHARE, "the cells' share of Σ M² in the edited texts"),
                Column(
                    "norm_share_chosen",
                    float,
                    _SHARE,
                    "the cells' share of Σ M² in the texts they are selected on",
                ),
                Column(
                    "of_treated", float, "ratio", "norm_share_chosen / that of the condition it controls for"
                ),
                Column("n_seeds", int, "seeds", "repeats"),
                Column("n_texts", int, "texts", "texts of different content in the fold"),
            ),
            "overwritten cells by condition, layer, tensor and fold",
        ),
    )

    @classmethod
    def define(cls, params: QkParams) -> str:
        """State the cells that are overwritten and how they are selected."""
        tensors = {"q": "queries", "k": "keys", "both": "queries and keys"}[params.tensors]
        side = {"post": "after rotation", "pre": "as projected"}[params.rotation]
        reference = {"global": "all cells of the tensor", "per_head": "the cells of its head"}[params.mean]
        return (
            f"cells (head × dimension) of {tensors} {side} are overwritten in all layers, at all positions; massive: "
            f"norm over {params.multiple:g} × the mean of {reference}; selected on other texts"
        )

    def setup(self) -> None:
        """Start with no texts."""
        self.moments = CellMoments()

    @property
    def points(self) -> dict[str, str]:
        """Hook points in a layer, by tensor."""
        points, tensors = POINTS[self.params.rotation], self.params.tensors
        return points if tensors == "both" else {tensors: points[tensors]}

    def hooks(self) -> Sequence[str]:
        """Return the points of queries and keys, before or after the rotation."""
        return [in_layer("{layer}", point) for point in self.points.values()]

    def update(self, layer: LayerView) -> None:
        """Add the norms and sums of this layer for the texts of the batch."""
        self.moments.add(layer, self.points)

    def merge(self, other: Metric[QkParams]) -> None:
        """Merge another instance, with its norms and sums."""
        super().merge(other)
        if isinstance(other, QkDisruption):
            self.moments.merge(other.moments)

    def conditions(self) -> Sequence[Condition]:
        """Return the requested conditions, without those that have nothing to overwrite in this model."""
        plan = self._plan()
        if plan is None:
            self.warn(
                "no condition is run: cells are selected on texts other than those they are tested on; use two "
                "texts or more"
            )
            return []
        conditions: list[Condition] = []
        for name in self.params.recipe_names:
            treated_name = RECIPES[name].control_for
            if treated_name is not None and all(condition.name != treated_name for condition in conditions):
                continue
            reason = plan.reason_to_skip(name)
            if reason:
                controls = [
                    control for control in self.params.recipe_names if RECIPES[control].control_for == name
                ]
                with_controls = f", with its controls {', '.join(controls)}" if controls else ""
                self.warn(f"{name} is left out{with_controls}: {reason}")
                continue
            conditions += [self._condition(plan, name, seed) for seed in plan.seeds(name)]
            self._warn_of_mismatch(plan, name)
        return conditions

    def compute(self) -> Mapping[str, Table]:
        """Return the tables of every causal metric, and the overwritten cells."""
        return {**super().compute(), "dimensions": self.table("dimensions", self._dimension_rows())}

    def _plan(self) -> CellPlan | None:
        """Return the cells to overwrite; None if texts have no others to select on."""
        n_unusable = len(self.moments.squares) - len(self.moments.usable_texts)
        if n_unusable:
            self.warn(
                f"in {n_unusable} texts queries or keys are NaN or infinite: no cell is selected on them"
            )
        folds = Folds.split(self.moments, self.params.folds)
        if folds is None:
            return None
        over: Literal["global", "per_head"] = "per_head" if self.params.mean == "per_head" else "global"
        rule = SelectionRule(self.params.multiple, over)
        return CellPlan(self.moments, folds, rule, self.params.seeds, self.seed)

    def _condition(self, plan: CellPlan, name: str, seed: int | None) -> Condition:
        cells, recipe = plan.cells(name, seed), RECIPES[name]
        edits = []
        for layer_point in plan.nonzero_points(cells):
            layer, tensor = layer_point
            values = plan.means(layer_point) if recipe.writes_mean else None
            overwrite = OverwriteCells(cells[layer_point], plan.folds.fold_of, values)
            edits.append(Edit(in_layer(layer, self.points[tensor]), overwrite))
        return Condition(
            name,
            edits,
            seed=seed,
            control_for=recipe.control_for,
            params={"what": recipe.help, **self.params.as_dict()},
        )

    def _warn_of_mismatch(self, plan: CellPlan, name: str) -> None:
        """Warn if a matched control's Σ M² is far from that of the condition it controls for."""
        if not RECIPES[name].is_matched:
            return
        match_range = plan.match_range(name)
        if match_range is None:
            return
        lowest, highest = match_range
        if not 1 - MATCH_WARNING <= lowest <= highest <= 1 + MATCH_WARNING:
            self.warn(
                f"{name} overwrites {lowest:.2f} to {highest:.2f} times the Σ M² of {RECIPES[name].control_for}, "
                "by layer and tensor (table dimensions)"
            )

    def _dimension_rows(self) -> Iterator[TableRow]:
        import numpy as np

        plan = self._plan()
        if plan is None:
            return
        for name in self.params.recipe_names:
            treated_name = RECIPES[name].control_for
            repeats = [plan.cells(name, seed) for seed in plan.seeds(name)]
            for layer_point in plan.moments.layer_points:
                for fold in range(plan.folds.n):
                    n_cells = float(np.mean([cells[layer_point][fold].sum() for cells in repeats]))
                    fraction = n_cells / repeats[0][layer_point][fold].size
                    edited_share, selected_share = np.mean(
                        [plan.norm_shares(cells, layer_point, fold) for cells in repeats], axis=0
                    ).tolist()
                    treated_share = (
                        plan.norm_shares(plan.cells(treated_name, None), layer_point, fold)[1]
                        if treated_name
                        else 0.0
                    )
                    of_treated = selected_share / treated_share if treated_share else None
                    yield (
                        name, *layer_point, fold, n_cells, fraction, edited_share, selected_share, of_treated,
                        len(repeats), len(plan.folds.members(fold)),
                    )  # fmt: skip


@hookimpl
def phaselens_metrics() -> list[type[Metric[Any]] | str]:
    """Return the metrics in this file."""
    return [QkDisruption]
