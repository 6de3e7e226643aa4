"""Loss without massive activations: exactly the coordinates that other texts have, at the layer where they appear.

Sun et al. 2024 (arXiv:2402.17762), section 3, set a handful of coordinates to zero, and to their mean. Here
coordinates and means come from other texts than those they are tested on. The controls overwrite as many random
dimensions, or random dimensions of the same norm, because a coordinate of a thousand times the usual size is most of
its token's norm.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phaselens.plugin import (
    CAUSAL_TABLES,
    Column,
    Condition,
    Edit,
    LayerView,
    Metric,
    Params,
    Table,
    TableSpec,
    hookimpl,
    in_layer,
    param,
)
from phaselens_plugins._causal import DEFAULT_SEEDS, REACH, Ablation
from phaselens_plugins._common import LAYER, N_TEXTS, TableRow
from phaselens_plugins._massive_moments import BOS, CLASSES, OTHER, Criterion, MassiveMoments
from phaselens_plugins._massive_plan import (
    COUNT,
    MASSIVE,
    NORM,
    NORM_EVERYWHERE,
    MassivePlan,
    OverwriteCoordinates,
)
from phaselens_plugins._residual import RESIDUAL

ZERO, MEAN = "0", "mean"
#: What each target is called in the conditions' names.
NAMES = {
    MASSIVE: "massive",
    COUNT: "random, same number",
    NORM: "random, same norm",
    NORM_EVERYWHERE: "random, same norm, all tokens",
}
#: The controls of each replacement: the norm that is removed is that of the values set to 0.
CONTROLS = {ZERO: (COUNT, NORM, NORM_EVERYWHERE), MEAN: (COUNT,)}
REPLACEMENTS = {"zero": (ZERO,), "mean": (MEAN,), "both": (ZERO, MEAN)}


@dataclass(frozen=True)
class MassiveAblationParams(Params):
    """Parameters of the metric."""

    threshold: float = param(100.0, help="a massive coordinate is larger than this", minimum=0)
    ratio: float = param(
        1000.0,
        help="a massive coordinate is at least this many times the median of all coordinates",
        minimum=0,
    )
    to: str = param(
        "both",
        help="what massive coordinates are set to: 0 (zero), the mean of their dimension over tokens without a "
        "massive coordinate (mean), or each in turn",
        choices=tuple(REPLACEMENTS),
    )
    folds: int = param(
        2,
        help="folds of texts; the coordinates of a fold are those that the other folds' texts have",
        minimum=2,
    )
    min_share: float = param(
        0.0,
        help="share of the other texts in which a coordinate must be massive; 0: in any",
        unit="share of texts",
        minimum=0,
        maximum=1,
    )
    seeds: int = param(DEFAULT_SEEDS, help="draws of each random control; 0: no controls", minimum=0)


class MassiveAblation(Ablation[MassiveAblationParams]):
    """Metric of the loss with massive coordinates of the residual stream overwritten where they first appear."""

    name = "massive-ablation"
    version = "1"
    title = "massive activations overwritten"
    description = "loss without the massive coordinates that other texts have, and without random ones"
    citation = "Sun et al. 2024, arXiv:2402.17762"
    Params = MassiveAblationParams
    tables = (
        *CAUSAL_TABLES,
        REACH,
        TableSpec(
            "coordinates",
            (
                Column("fold", int, "index", "the fold of the edited texts; the others have the coordinate"),
                LAYER,
                Column("tokens", str, None, f"{BOS} (position 0) or {OTHER}"),
                Column("dimension", int, "index", "of the residual stream"),
                Column("share", float, "share of texts", "texts of the other folds in which it is massive"),
                Column("value", float, "activation", "mean over their massive tokens, with its sign"),
                Column(
                    "mean",
                    float,
                    "activation",
                    "mean of the dimension over their tokens without a massive coordinate",
                ),
                N_TEXTS,
            ),
            "the massive coordinates of each fold, in the first layer where they are massive",
        ),
        TableSpec(
            "edited",
            (
                Column("condition", str, None, "the condition's name"),
                LAYER,
                Column("fold", int, "index", "the fold of the edited texts"),
                Column(
                    "n_dimensions",
                    float,
                    "dimensions",
                    "overwritten dimensions, of all tokens, mean over seeds",
                ),
                Column(
                    "norm",
                    float,
                    "norm",
                    "root of Σ x² of the overwritten coordinates, mean over the fold's texts and seeds",
                ),
                Column("of_treated", float, "ratio", "Σ x² over that of the massive coordinates"),
                Column("n_seeds", int, "seeds", "draws"),
                N_TEXTS,
            ),
            "what each condition overwrites, by layer and fold",
        ),
    )

    @classmethod
    def define(cls, params: MassiveAblationParams) -> str:
        """State the criterion, what is written, and on which texts the coordinates are selected."""
        written = {
            "zero": "0",
            "mean": "the mean of their dimension",
            "both": "0, and := the mean of their dimension",
        }
        controls = f"; controls: random dimensions, {params.seeds} draws" if params.seeds else ""
        return (
            f"coordinates with |a| > {params.threshold:g} and |a| ≥ {params.ratio:g} × the median in other texts := "
            f"{written[params.to]}, after the layer where they first appear{controls}"
        )

    def setup(self) -> None:
        """Start with no texts."""
        super().setup()
        self.criterion = Criterion(self.params.threshold, self.params.ratio)
        self.moments = MassiveMoments()

    def hooks(self) -> Sequence[str]:
        """Return the residual stream after each layer."""
        return [in_layer("{layer}", RESIDUAL)]

    def update(self, layer: LayerView) -> None:
        """Measure this layer's massive coordinates in the texts of the batch."""
        self.moments.add(layer, self.criterion)

    def merge(self, other: Metric[MassiveAblationParams]) -> None:
        """Merge another instance, with its texts."""
        super().merge(other)
        if isinstance(other, MassiveAblation):
            self.moments.merge(other.moments)

    def conditions(self) -> Sequence[Condition]:
        """Return the conditions that overwrite the massive coordinates, and their controls."""
        plan = self._plan()
        if plan is None or not plan.layers:
            return []
        conditions = []
        for replacement in REPLACEMENTS[self.params.to]:
            conditions.append(self._condition(plan, MASSIVE, replacement))
            for what in CONTROLS[replacement] if self.params.seeds else ():
                reason = plan.reason_to_skip(what, self.params.seeds)
                if reason:
                    self.warn(f"{_name(what, replacement)} is left out: {reason}")
                    continue
                conditions += [
                    self._condition(plan, what, replacement, seed) for seed in range(self.params.seeds)
                ]
        return conditions

    def _condition(
        self, plan: MassivePlan, what: str, replacement: str, seed: int | None = None
    ) -> Condition:
        edits = []
        for layer in plan.layers:
            values = plan.means(layer) if replacement == MEAN else None
            overwrite = OverwriteCoordinates(
                plan.edits(layer, what, seed or 0), plan.fold_of, self.criterion, values
            )
            edits.append(Edit(in_layer(layer, RESIDUAL), overwrite))
        control_for = None if what == MASSIVE else _name(MASSIVE, replacement)
        return Condition(
            _name(what, replacement), edits, seed=seed, control_for=control_for, params=self.params.as_dict()
        )

    def _plan(self) -> MassivePlan | None:
        """Return the coordinates of each fold; None with fewer than two texts to select them on."""
        moments, params = self.moments, self.params
        n_unusable = len(moments.by_text) - len(moments.usable)
        if n_unusable:
            self.warn(
                f"in {n_unusable} texts residuals are NaN or infinite: no coordinate is selected on them"
            )
        plan = MassivePlan.split(moments, params.folds, params.min_share, self.seed)
        if plan is None:
            self.warn(
                "no condition is run: coordinates are selected on texts other than those they are tested on; use two "
                "texts of different content or more"
            )
            return None
        if not plan.layers:
            self.warn(f"no condition is run: no coordinate is massive{self._largest()}")
        for fold in range(plan.n_folds) if plan.layers else ():
            if not plan.coordinates[fold]:
                self.warn(
                    f"the texts of fold {fold} are not edited: no coordinate is massive in those of the others"
                )
        return plan

    def _largest(self) -> str:
        """Return the end of a message that states how far the texts are from the criterion."""
        largest = [
            (layer.largest_ratio, layer.largest, index)
            for layers in self.moments.by_text.values()
            for index, layer in layers.items()
            if layer.is_finite and layer.largest_ratio == layer.largest_ratio
        ]
        if not largest:
            return ""
        ratio, value, layer = max(largest)
        share = f" in {self.params.min_share:g} of the texts" if self.params.min_share else ""
        return (
            f"{share} (criterion: over {self.params.threshold:g}, and {self.params.ratio:g} × the median). The largest "
            f"ratio is {ratio:.3g}, of a coordinate of size {value:.3g} in layer {layer}; set lower ones by -P "
            f"{self.name}.threshold and -P {self.name}.ratio to test it"
        )

    def compute(self) -> Mapping[str, Table]:
        """Return the tables of every ablation, the massive coordinates, and what each condition overwrites."""
        plan = self._plan()
        has_coordinates = plan is not None and bool(plan.layers)
        return {
            **super().compute(),
            "coordinates": self.table("coordinates", _coordinate_rows(plan) if plan is not None else []),
            "edited": self.table(
                "edited", self._edited_rows(plan) if plan is not None and has_coordinates else []
            ),
        }

    def _edited_rows(self, plan: MassivePlan) -> Iterator[TableRow]:
        import numpy as np

        what_of = {
            _name(what, replacement): what
            for replacement in (ZERO, MEAN)
            for what in (MASSIVE, *CONTROLS[replacement])
        }
        for (name, *_), repeats in self.losses.repeats.items():
            what = what_of[name]
            for layer in plan.layers:
                for fold in range(plan.n_folds):
                    members = plan.members(fold)
                    edits = [plan.edits(layer, what, repeat.seed or 0)[fold] for repeat in repeats]
                    squares = [plan.edited_square(members, layer, edit) for edit in edits]
                    treated = plan.treated_square(members, fold, layer)
                    if what == MASSIVE:
                        squares = [treated]
                    counts = [
                        len(edit.bos) + len(edit.pairs) + len(edit.rows) + len(edit.everywhere)
                        for edit in edits
                    ]
                    yield (
                        name, layer, fold, float(np.mean(counts)),
                        float(np.mean(np.sqrt(np.array(squares) / max(1, len(members))))),
                        float(np.mean(squares)) / treated if treated else None, len(repeats), len(members),
                    )  # fmt: skip


def _name(what: str, replacement: str) -> str:
    """Return the name of a condition."""
    return f"{NAMES[what]} := {replacement}"


def _coordinate_rows(plan: MassivePlan) -> Iterator[TableRow]:
    for fold in range(plan.n_folds):
        n_texts = len(plan.selection(fold))
        order = sorted(
            plan.coordinates[fold],
            key=lambda entry: (entry.layer, CLASSES.index(entry.tokens), entry.dimension),
        )
        for entry in order:
            yield (
                fold, entry.layer, entry.tokens, entry.dimension, entry.share, entry.value, entry.mean, n_texts,
            )  # fmt: skip


@hookimpl
def phaselens_metrics() -> list[type[Metric[Any]] | str]:
    """Return the metrics in this file."""
    return [MassiveAblation]
