"""Loss with the attention scale multiplied by β, in all layers or in each alone, by position.

A model that reads further than it was trained for spreads its attention over more keys; a larger scale sharpens it
again. DroPE (arXiv:2512.12167, appendix C.2) sets β = 1 + c ln s with s = T / trained length, c = 0.412 for its 494M
model and 0.103 for SmolLM-360M. METRICS 10.5.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phaselens.plugin import (
    BASELINE,
    CausalMetric,
    Condition,
    ConditionKey,
    Edit,
    InputError,
    LayerView,
    Metric,
    Params,
    Site,
    Table,
    TextOutcome,
    hookimpl,
    in_layer,
    param,
)
from phaselens_plugins._causal import layer_ranges, merge_nested, parse_layers
from phaselens_plugins._common import TableRow
from phaselens_plugins._number_lists import parse_numbers
from phaselens_plugins._position_bins import PositionBins, pooled_means
from phaselens_plugins._temperature_tables import TABLES, draw_temperature

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from torch import Tensor

QUERIES, EMBEDDED = "attn.hook_rot_q", "hook_embed"
DROPE = "β = 1 + c ln s"


@dataclass(frozen=True)
class TemperatureParams(Params):
    """Parameters of the metric."""

    betas: str = param(
        "0.8, 0.9, 1, 1.1, 1.2, 1.4", help="factors of the attention scale, above 0, separated by commas"
    )
    at: str = param(
        "all",
        help="in the layers at once (all); or also in each of them alone (sweep)",
        choices=("all", "sweep"),
    )
    layers: str = param("all", help="the layers: all, or numbers and ranges, such as 0,2-4")
    c: float | None = param(
        0.103,
        help="also β = 1 + c ln s of DroPE, s a text's length over the trained length, if a text is longer; none: not",
    )
    per_octave: int = param(
        1, help="bins for each doubling of the position", unit="bins", minimum=1, maximum=16
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_betas(self.betas)
        layer_ranges(self.layers)


def parse_betas(text: str) -> list[float]:
    """Return the factors that a text names, ascending and each once, with 1; InputError for others than above 0.

    >>> parse_betas("1.2, .9")
    [0.9, 1.0, 1.2]
    """
    betas = parse_numbers(
        text.split(","),
        lambda beta: 0 < beta < math.inf,
        "betas has {entry!r}; give numbers above 0, separated by commas",
    )
    return sorted({1.0, *betas})


@dataclass(frozen=True)
class ScaleQueries:
    """Edit function that multiplies queries, and so the scores before a softcap, by a number."""

    beta: float

    def __call__(self, tensor: Tensor, site: Site) -> Tensor:
        """Return `tensor` times β."""
        return tensor * self.beta


@dataclass(frozen=True)
class ScaleByLength:
    """Edit function that multiplies a text's queries by 1 + c ln s, s its length over `n_trained`, where s > 1."""

    c: float
    n_trained: int

    def __call__(self, tensor: Tensor, site: Site) -> Tensor:
        """Return tensor [batch, pos, …] times each text's β."""
        import torch

        if site.batch is None:
            raise LookupError(f"{site.point}: β depends on the text's length; run this condition on texts")
        betas = torch.tensor(
            [1 + self.c * math.log(max(1.0, length / self.n_trained)) for length in site.batch.lengths],
            dtype=torch.float64,
        )
        return tensor * betas.to(tensor.device, tensor.dtype).view(-1, *(1 for _ in tensor.shape[1:]))


class Temperature(CausalMetric[TemperatureParams]):
    """Metric of the loss by β, and of the best β by position."""

    name = "temperature"
    version = "1"
    title = "attention temperature"
    description = "loss with the attention scale multiplied by β, by layer and position; the best β"
    citation = "Gelberg et al. 2025, arXiv:2512.12167, appendix C.2"
    Params = TemperatureParams
    tables = TABLES
    plots = True

    @classmethod
    def define(cls, params: TemperatureParams) -> str:
        """State the edit, the layers and DroPE's β."""
        layers = "all layers" if params.layers.strip() == "all" else f"layers {params.layers}"
        each = ", and in each alone" if params.at == "sweep" else ""
        drope = "" if params.c is None else f"; β = 1 + {params.c:g} ln s for texts beyond the trained length"
        return f"attention scale × β in {layers} at once{each}, β in {params.betas}{drope}; sink logits stay"

    def setup(self) -> None:
        """Refuse layers that the model does not have, or that have no attention; start without losses."""
        super().setup()
        chosen = parse_layers(self.params.layers, self.model)
        self.layers = [layer for layer in chosen if layer in self.model.attention_layers]
        if not self.layers:
            raise InputError(f"{self.model.label}: none of the layers {self.params.layers} has attention")
        self.bins = PositionBins(self.params.per_octave)
        self.longest = 0
        #: Mean loss and number of losses by bin, [2, bin], of each text, by condition.
        self.binned: dict[ConditionKey, dict[int, np.ndarray]] = {}

    def hooks(self) -> Sequence[str]:
        """Return a point that shows the lengths of the texts."""
        return [EMBEDDED]

    def update(self, layer: LayerView) -> None:
        """Keep the length of the longest text."""
        self.longest = max(self.longest, *layer.batch.lengths)

    def merge(self, other: Metric[TemperatureParams]) -> None:
        """Merge another instance, with its losses by position."""
        super().merge(other)
        if isinstance(other, Temperature):
            merge_nested(self.binned, other.binned)
            self.longest = max(self.longest, other.longest)

    def conditions(self) -> Sequence[Condition]:
        """Return a condition for each β, in all layers and in each; β = 1 is the baseline."""
        sites: list[int | None] = [None, *(self.layers if self.params.at == "sweep" else [])]
        conditions = [
            Condition(
                condition_name(beta, layer),
                self._edits(ScaleQueries(beta), layer),
                layer,
                params={"beta": beta},
            )
            for layer in sites
            for beta in self._other_betas
        ]
        n_trained, c = self.model.n_ctx_trained, self.params.c
        if c is None or c == 0:
            return conditions
        if n_trained is None:
            self.warn(f"{DROPE} is missing: the checkpoint does not state the length that it was trained for")
        elif self.longest <= n_trained:
            self.warn(
                f"{DROPE} is missing: no text has more than the {n_trained} tokens that the model was trained for"
            )
        else:
            edits = self._edits(ScaleByLength(c, n_trained), None)
            conditions.append(Condition(DROPE, edits, params={"c": c, "n_ctx_trained": n_trained}))
        return conditions

    @property
    def _betas(self) -> list[float]:
        return parse_betas(self.params.betas)

    @property
    def _other_betas(self) -> list[float]:
        """The factors without 1."""
        return [beta for beta in self._betas if beta != 1]

    def _edits(self, scale: ScaleQueries | ScaleByLength, layer: int | None) -> list[Edit]:
        return [
            Edit(in_layer(index, QUERIES), scale) for index in (self.layers if layer is None else [layer])
        ]

    def record(self, condition: Condition, outcome: TextOutcome) -> None:
        """Record a text's loss, and its means over bins of positions."""
        import numpy as np
        import torch

        super().record(condition, outcome)
        losses = torch.cat([torch.tensor([math.nan]), torch.from_numpy(outcome.loss).double()])
        means, counts = self.bins.means(losses)
        self.binned.setdefault(condition.key, {})[outcome.index] = np.stack([means.numpy(), counts.numpy()])

    def compute(self) -> Mapping[str, Table]:
        """Return the tables of every causal metric, and those by β and position."""
        tables = dict(super().compute())
        best = list(self._best_rows())
        return {
            **tables,
            "sweep": self.table("sweep", self._sweep_rows(tables["conditions"])),
            "lengths": self.table("lengths", self._length_rows()),
            "best": self.table("best", best),
            "summary": self.table("summary", [self._summary(best)]),
        }

    @property
    def _sites(self) -> list[int | None]:
        return [None, *(self.layers if self.params.at == "sweep" else [])]

    def _sweep_rows(self, conditions: Table) -> Iterator[TableRow]:
        by_name = {(row["condition"], row["layer"]): row for row in conditions.records()}
        columns = ("ratio", "ci_low", "ci_high", "delta_nats", "delta_low", "delta_high", "n_texts")
        n_texts = by_name[BASELINE.name, None]["n_texts"]
        for layer in self._sites:
            for beta in self._betas:
                if beta == 1:
                    unchanged = (1.0, 1.0, 1.0, 0.0, 0.0, 0.0) if n_texts else (None,) * 6
                    yield layer, beta, *unchanged, n_texts
                    continue
                row = by_name.get((condition_name(beta, layer), layer))
                if row is not None:
                    yield layer, beta, *(row[column] for column in columns)

    def _losses_of(self, condition: Condition, bins: Sequence[int]) -> np.ndarray:
        """Return the mean loss [text] over the positions of these bins; NaN where a text has none."""
        import numpy as np

        by_text = self.binned.get(condition.key, {})
        missing = np.full((2, self.bins.n), np.nan)
        stacked = np.stack([by_text.get(index, missing) for index in self.losses.predicted_by_content])
        losses: np.ndarray = pooled_means(
            stacked[:, 0], np.where(np.isnan(stacked[:, 1]), 0.0, stacked[:, 1]), bins
        )
        return np.where(np.isfinite(losses), losses, np.nan)

    @property
    def _n_bins(self) -> int:
        """The number of bins that a text reaches."""
        return self.bins.n_reached(
            max((self.losses.lengths[index] for index in self.losses.predicted_by_content), default=0)
        )

    def _length_rows(self) -> Iterator[TableRow]:
        import numpy as np

        from phaselens.uncertainty import paired_interval

        if not self.losses.predicted_by_content:
            return
        reported = [BASELINE, *self.losses.effective_conditions]
        for condition in reported:
            beta = 1.0 if condition is BASELINE else condition.params.get("beta")
            for index in range(self._n_bins):
                loss, unedited = self._losses_of(condition, [index]), self._losses_of(BASELINE, [index])
                present = ~np.isnan(loss) & ~np.isnan(unedited)
                interval = paired_interval(
                    np.where(present, loss, 0.0),
                    np.where(present, unedited, 0.0),
                    present=present,
                    seed=self.seed,
                )
                yield (
                    condition.layer, condition.name, beta, *self.bins.bounds(index),
                    self.bins.beyond(index, self.model.n_ctx_trained),
                    float(loss[present].mean()) if present.any() else None,
                    *(bound.tolist() for bound in interval), int(present.sum()),
                )  # fmt: skip

    def _best_rows(self) -> Iterator[TableRow]:
        if not self.losses.predicted_by_content:
            return
        conditions = {condition.key: condition for condition in self.losses.effective_conditions}
        for layer in self._sites:
            keys = {beta: (condition_name(beta, layer), layer, None, None) for beta in self._other_betas}
            swept = {beta: conditions[key] for beta, key in keys.items() if key in conditions}
            # Of equal losses the first counts: the β nearest to 1, the unedited model.
            by_distance = sorted({1.0: BASELINE, **swept}.items(), key=lambda item: abs(math.log(item[0])))
            by_beta = dict(by_distance)
            yield self._best(layer, None, by_beta)
            for index in range(self._n_bins):
                yield self._best(layer, index, by_beta)

    def _best(self, layer: int | None, index: int | None, by_beta: Mapping[float, Condition]) -> TableRow:
        """Return the row of the best β in one bin, or over all positions."""
        import numpy as np

        from phaselens.uncertainty import mean_interval

        bins = range(self._n_bins) if index is None else [index]
        losses = np.stack([self._losses_of(condition, bins) for condition in by_beta.values()], axis=1)
        losses = losses[~np.isnan(losses).any(1)]
        betas = np.array(list(by_beta))
        bounds = (None, None) if index is None else self.bins.bounds(index)
        beyond = None if index is None else self.bins.beyond(index, self.model.n_ctx_trained)
        if not len(losses):
            return layer, *bounds, beyond, *([None] * 7), 0.0, 0
        interval = mean_interval(
            losses, transform=lambda mean: betas[mean.argmin(-1)][..., None], seed=self.seed
        )
        unedited = losses[:, betas == 1][:, 0]
        gain = float((unedited - losses[:, losses.mean(0).argmin()]).mean())
        held_out: list[float | None] = [None, None, None]
        if len(losses) > 1:
            held_out = [
                bound.tolist() for bound in mean_interval(_held_out_gains(losses, unedited), seed=self.seed)
            ]
        beta = [bound.tolist()[0] for bound in interval]
        return layer, *bounds, beyond, *beta, gain, *held_out, 0.0, len(losses)

    def _summary(self, best: Sequence[TableRow]) -> TableRow:
        overall = next((row for row in best if row[0] is None and row[1] is None), None)
        n_trained = self.model.n_ctx_trained
        if overall is None:
            return None, None, None, None, n_trained, 0
        return *overall[4:7], overall[8], n_trained, overall[-1]

    @classmethod
    def plot(cls, tables: Mapping[str, Table], figure: Figure) -> None:
        """Draw the change of the loss against β, and the best β against the position, and by layer after a sweep."""
        draw_temperature(tables, figure)


def _held_out_gains(losses: np.ndarray, unedited: np.ndarray) -> np.ndarray:
    """Return each text's loss at β = 1 minus that at the β which is best on the other half of the texts, [text].

    `losses` [text, β] are in the order of the texts' content, which decides the halves.
    """
    import numpy as np

    fold = np.arange(len(losses)) % 2
    chosen = np.array([losses[fold != half].mean(0).argmin() for half in (0, 1)])
    gains: np.ndarray = unedited - losses[np.arange(len(losses)), chosen[fold]]
    return gains


def condition_name(beta: float, layer: int | None) -> str:
    """Return the name of a condition.

    >>> condition_name(1.2, None), condition_name(0.9, 3)
    ('β = 1.2', 'β = 0.9, one layer')
    """
    return f"β = {beta:g}" if layer is None else f"β = {beta:g}, one layer"


@hookimpl
def phaselens_metrics() -> list[type[Metric[Any]] | str]:
    """Return the metrics in this file."""
    return [Temperature]
