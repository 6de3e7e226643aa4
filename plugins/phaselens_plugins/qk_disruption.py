"""What massive values of queries and keys are worth: they are overwritten in all layers, and so are others instead.

Jin et al. 2025 (arXiv:2502.01563) disturb them and compare with the smallest cells. Cells are chosen, and the values
written into them computed, on clean passes over other texts than those they are tried on. Each control is compared
with its treated condition text by text.
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
    param,
)
from phaselens_plugins._cells import Folds, Moments, Overwrite
from phaselens_plugins._recipes import RECIPES, Plan, Rule

POINTS = {
    "post": {"q": "attn.hook_rot_q", "k": "attn.hook_rot_k"},
    "pre": {"q": "attn.hook_q", "k": "attn.hook_k"},
}
NEAR = 0.1
"""A control of equal norm that is off by more than this share anywhere is warned of."""
_SHARE = "share of Σ M²"


@dataclass(frozen=True)
class QkChoice(Params):
    """Which cells of queries and keys are chosen, and on which texts."""

    tensors: str = param("both", help="queries, keys or both", choices=("q", "k", "both"))
    rotation: str = param(
        "post", help="queries and keys after the rotation, or before it as projected", choices=("post", "pre")
    )
    multiple: float = param(5.0, help="a cell is massive above this many times the mean cell", minimum=0)
    mean: str = param(
        "global",
        help="that mean: over all cells of a tensor, or over each head's",
        choices=("global", "per_head"),
    )
    folds: int = param(
        2, help="texts are dealt into so many folds; cells are chosen on the other folds", minimum=2
    )


@dataclass(frozen=True)
class QkParams(QkChoice):
    """What the metric can be asked for."""

    conditions: str = param(
        "massive,random-count,random-norm,top-1,smallest,top-1-random,top-1-norm,top-1-mean",
        help=f"which, with commas between: {', '.join(RECIPES)}; or all",
    )
    seeds: int = param(3, help="repeats of each random control", minimum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        known = ", ".join(RECIPES)
        for name in self._named():
            if name not in RECIPES:
                raise InputError(
                    f"conditions has {name!r}; give all, or some of {known}, with commas between"
                )

    @property
    def asked(self) -> list[str]:
        """Names of the conditions in the order of `RECIPES`, and of those that they are controls of."""
        named = set(self._named())
        named |= {treated for name in named if (treated := RECIPES[name].control_for) is not None}
        return [name for name in RECIPES if name in named]

    def _named(self) -> list[str]:
        whole = self.conditions.strip() == "all"
        return list(RECIPES) if whole else [name.strip() for name in self.conditions.split(",")]


class QkDisruption(CausalMetric[QkParams]):
    """Massive or largest cells of queries and keys overwritten in every layer, beside controls."""

    name = "qk-disruption"
    version = "1"
    title = "massive queries and keys overwritten"
    description = "the loss without massive values of queries and keys, and without others like them"
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
                    "fold", int, "index", "of the texts it is done to; cells are chosen on the other folds"
                ),
                Column("n_cells", float, "cells", "head × dimension, overwritten; mean over seeds"),
                Column("fraction", float, "share of cells", "the same as a share of the tensor's"),
                Column("norm_share", float, _SHARE, "what they hold in the texts it is done to"),
                Column("norm_share_chosen", float, _SHARE, "what they hold in the texts they were chosen on"),
                Column("of_treated", float, "ratio", "norm_share_chosen over that of what it controls"),
                Column("n_seeds", int, "seeds", "repeats"),
                Column("n_texts", int, "texts", "different texts in the fold"),
            ),
            "what is overwritten, by condition, layer, tensor and fold",
        ),
    )

    @classmethod
    def define(cls, params: QkParams) -> str:
        """What is overwritten, and how it is chosen."""
        which = {"q": "queries", "k": "keys", "both": "queries and keys"}[params.tensors]
        side = {"post": "after rotation", "pre": "as projected"}[params.rotation]
        over = {"global": "all cells of the tensor", "per_head": "the cells of its head"}[params.mean]
        return (
            f"cells (head × dimension) of {which} {side} are overwritten in all layers, at all positions; massive: "
            f"norm over {params.multiple:g} × the mean of {over}; chosen on other texts"
        )

    def setup(self) -> None:
        """Nothing was seen yet."""
        self.moments = Moments()

    @property
    def points(self) -> dict[str, str]:
        """Hook points in a layer, by tensor."""
        points, tensors = POINTS[self.params.rotation], self.params.tensors
        return points if tensors == "both" else {tensors: points[tensors]}

    def hooks(self) -> Sequence[str]:
        """Queries and keys, on the chosen side of the rotation."""
        return [f"blocks.{{layer}}.{point}" for point in self.points.values()]

    def update(self, layer: LayerView) -> None:
        """Norms and sums of this layer for the texts of the batch."""
        self.moments.add(layer, self.points)

    def merge(self, other: Metric[QkParams]) -> None:
        """Also the norms and sums."""
        super().merge(other)
        if isinstance(other, QkDisruption):
            self.moments.merge(other.moments)

    def conditions(self) -> Sequence[Condition]:
        """Those asked for, without those that have nothing to overwrite in this model."""
        plan = self._plan()
        if plan is None:
            self.warn(
                "no condition is run: cells are chosen on other texts than they are tried on, which takes two texts"
            )
            return []
        made: list[Condition] = []
        for name in self.params.asked:
            treated = RECIPES[name].control_for
            if treated is not None and all(one.name != treated for one in made):
                continue
            lacking = plan.lacking(name)
            if lacking:
                controls = [one for one in self.params.asked if RECIPES[one].control_for == name]
                without = f", with its controls {', '.join(controls)}" if controls else ""
                self.warn(f"{name} is left out{without}: {lacking}")
                continue
            made += [self._condition(plan, name, seed) for seed in plan.seeds(name)]
            self._say_how_close(plan, name)
        return made

    def compute(self) -> Mapping[str, Table]:
        """The tables of every causal metric, and what was overwritten."""
        return {**super().compute(), "dimensions": self.table("dimensions", self._dimensions())}

    def _plan(self) -> Plan | None:
        """What to overwrite; None where texts have no others to choose on."""
        unusable = len(self.moments.squares) - len(self.moments.usable)
        if unusable:
            self.warn(f"in {unusable} texts queries or keys are NaN or infinite: no cell is chosen on them")
        folds = Folds.deal(self.moments, self.params.folds)
        if folds is None:
            return None
        over: Literal["global", "per_head"] = "per_head" if self.params.mean == "per_head" else "global"
        rule = Rule(self.params.multiple, over)
        return Plan(self.moments, folds, rule, self.params.seeds, self.seed)

    def _condition(self, plan: Plan, name: str, seed: int | None) -> Condition:
        cells, recipe = plan.cells(name, seed), RECIPES[name]
        edits = []
        for place in plan.alive(cells):
            values = plan.means(place) if recipe.mean else None
            point = f"blocks.{place[0]}.{self.points[place[1]]}"
            edits.append(Edit(point, Overwrite(cells[place], plan.folds.of, values)))
        return Condition(
            name,
            edits,
            seed=seed,
            control_for=recipe.control_for,
            params={"what": recipe.help, **self.params.as_dict()},
        )

    def _say_how_close(self, plan: Plan, name: str) -> None:
        if not RECIPES[name].matched:
            return
        found = plan.match(name)
        if found is not None and not 1 - NEAR <= found[0] <= found[1] <= 1 + NEAR:
            self.warn(
                f"{name} overwrites {found[0]:.2f} to {found[1]:.2f} times the Σ M² of {RECIPES[name].control_for}, "
                "by layer and tensor (table dimensions)"
            )

    def _dimensions(self) -> Iterator[tuple[Any, ...]]:
        import numpy as np

        plan = self._plan()
        if plan is None:
            return
        for name in self.params.asked:
            treated = RECIPES[name].control_for
            repeats = [plan.cells(name, seed) for seed in plan.seeds(name)]
            for layer, tensor in plan.moments.places:
                place = layer, tensor
                for fold in range(plan.folds.n):
                    n_cells = np.mean([cells[place][fold].sum() for cells in repeats])
                    share = n_cells / repeats[0][place][fold].size
                    own, chosen = np.mean([plan.held(cells, place, fold) for cells in repeats], axis=0)
                    aim = plan.held(plan.cells(treated, None), place, fold)[1] if treated else 0.0
                    of_treated = chosen / aim if aim else None
                    n_texts = len(plan.folds.members(fold))
                    held = (own, chosen, of_treated)
                    yield name, layer, tensor, fold, n_cells, share, *held, len(repeats), n_texts


@hookimpl
def phaselens_metrics() -> list[type[Metric[Any]] | str]:
    """The metrics in this file."""
    return [QkDisruption]
