"""What removing each head costs, beside what the head looks like: tables, rank correlations and figure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phaselens.plugin import ADJUSTED_P, CellValue, Column, Table, TableSpec
from phaselens_plugins._causal import paired_interval_columns
from phaselens_plugins._common import HEAD, LAYER, TableRow, interval_columns, mean_over_texts, none_if_nan
from phaselens_plugins._drawing import INK, bare, escaped, numbers, records_by_model, styles

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

SHARE_OF_HEADS = "share of heads"
N_RESAMPLES = 2_000
"""Resamples of texts for rank correlations, each of which sorts all heads."""
_NATS = "nats/token"
_N_HEADS = Column("n_heads", int, "heads", "heads with a cost and an output")
_N_TEXTS = Column("n_texts", int, "texts", "texts with a predicted token")
_BY_OUTPUT = Column(
    "idle_by_output", float, SHARE_OF_HEADS, "heads whose output_share is below the parameter output_share"
)
_BOTH = Column("both", float, SHARE_OF_HEADS, "heads that are idle by loss and by output")
_BOTH_EXPECTED = Column(
    "both_expected", float, SHARE_OF_HEADS, "both by chance: idle_by_loss × idle_by_output of the same heads"
)
HEADS = TableSpec(
    "heads",
    (
        LAYER,
        HEAD,
        Column(
            "delta_nats",
            float,
            _NATS,
            "what the head's removal adds to the loss, mean over all predicted tokens",
        ),
        *paired_interval_columns(_NATS, "delta"),
        Column("p_value", float, "probability", "two-sided p of delta_nats, from random sign flips of texts"),
        Column(
            "sink",
            float,
            "share of attention",
            "on position 0, mean over later queries that see it, and texts",
        ),
        Column("entropy", float, "share of maximum", "normalised entropy of attention, mean over texts"),
        Column("output", float, "norm", "mean norm of the head's output, ‖z·W_O‖, over tokens and texts"),
        Column(
            "output_share",
            float,
            "ratio",
            "output over the mean of the layer's heads, mean over texts; 1 if all write alike",
        ),
        Column("idle_by_loss", int, "0 or 1", "1 if delta_nats is below epsilon"),
        Column(
            "surely_idle", int, "0 or 1", "1 if the upper end of the interval of delta_nats is below epsilon"
        ),
        Column("idle_by_output", int, "0 or 1", "1 if output_share is below the parameter output_share"),
        _N_TEXTS,
        *ADJUSTED_P,
    ),
    "one row per layer and head",
)
LAYERS = TableSpec(
    "layers",
    (
        LAYER,
        Column("idle_by_loss", float, SHARE_OF_HEADS, "heads whose removal adds less than epsilon"),
        *interval_columns(SHARE_OF_HEADS, "idle_low", "idle_high"),
        Column(
            "idle_null",
            float,
            SHARE_OF_HEADS,
            "idle_by_loss if all heads of the layer cost the same: 1 if their mean is below epsilon, else 0",
        ),
        _BY_OUTPUT,
        _BOTH,
        _BOTH_EXPECTED,
        Column("delta_mean", float, _NATS, "mean of delta_nats over the heads"),
        Column("delta_largest", float, _NATS, "largest delta_nats of a head"),
        Column("largest_head", int, "index", "the head with the largest delta_nats"),
        _N_HEADS,
        _N_TEXTS,
    ),
    "one row per layer",
)
RANKS = TableSpec(
    "ranks",
    (
        Column("quantity", str, None, "sink, entropy or output_share of a head, as in `heads`"),
        Column("spearman", float, "−1 to 1", "rank correlation of delta_nats with it, over all heads"),
        *interval_columns("−1 to 1"),
        Column("null", float, "−1 to 1", "mean rank correlation of heads in random order: 0"),
        Column("p_value", float, "probability", "two-sided p of a random order of the heads, 9,999 drawn"),
        Column("n_heads", int, "heads", "heads with both values"),
        _N_TEXTS,
        *ADJUSTED_P,
    ),
    "order of heads by cost against their order by appearance; intervals resample texts "
    f"({N_RESAMPLES:,} draws for more than 7)",
)
SUMMARY = TableSpec(
    "summary",
    (
        Column("idle_by_loss", float, SHARE_OF_HEADS, "heads whose removal adds less than epsilon"),
        Column("surely_idle", float, SHARE_OF_HEADS, "heads whose interval of delta_nats ends below epsilon"),
        _BY_OUTPUT,
        _BOTH,
        _BOTH_EXPECTED,
        _N_HEADS,
        _N_TEXTS,
    ),
    "one row per model",
)
QUANTITIES = ("sink", "entropy", "output_share")


@dataclass(frozen=True, eq=False)
class HeadCosts:
    """Costs and appearance of the heads of `layers`; arrays [text, layer, head], NaN where missing.

    `records` [layer][head] are the heads' rows of the table `conditions`, None without one. `changes` is the change of
    each text's loss, `looks` what the unedited model shows, by name; `n_predicted` [text] weighs the changes. `exists`
    [layer, head] tells which heads a layer has.
    """

    layers: Sequence[int]
    records: Sequence[Sequence[Mapping[str, CellValue] | None]]
    changes: np.ndarray
    looks: Mapping[str, np.ndarray]
    exists: np.ndarray
    n_predicted: np.ndarray
    epsilon: float
    output_share: float
    seed: int

    @property
    def n_texts(self) -> int:
        """The number of texts with a predicted token."""
        return len(self.n_predicted)

    def cost(self) -> np.ndarray:
        """Return what each head's removal adds to the loss [layer, head], mean over all predicted tokens."""
        import numpy as np

        cells = [
            [
                np.nan if record is None or record["delta_nats"] is None else record["delta_nats"]
                for record in row
            ]
            for row in self.records
        ]
        return np.array(cells, dtype=np.float64)

    def look(self, name: str) -> np.ndarray:
        """Return the mean over texts [layer, head] of one quantity."""
        return mean_over_texts(self.looks[name])

    def reasons(self) -> Iterator[str]:
        """Yield the reasons for which columns are missing."""
        import numpy as np

        missing = {name: np.isnan(values).all(0) & self.exists for name, values in self.looks.items()}
        for name in ("sink", "entropy"):
            layers = [str(layer) for layer, row in zip(self.layers, missing[name], strict=True) if row.any()]
            if layers:
                yield (
                    f"{name} is missing in layer {', '.join(layers)}: no text has a query that sees two keys and "
                    "whose attention is finite"
                )

    def head_rows(self) -> Iterator[TableRow]:
        """Yield the rows of `heads`."""
        looks = [self.look(name) for name in ("sink", "entropy", "output", "output_share")]
        for row, layer in enumerate(self.layers):
            for head, record in enumerate(self.records[row]):
                if not self.exists[row, head]:
                    continue
                of_loss: TableRow = (None,) * 4
                if record is not None:
                    of_loss = tuple(
                        record[name] for name in ("delta_nats", "delta_low", "delta_high", "p_value")
                    )
                delta, _, high, _ = of_loss
                share = none_if_nan(looks[3][row, head])
                yield (
                    layer, head, *of_loss, *(none_if_nan(values[row, head]) for values in looks),
                    _flag(delta, self.epsilon), _flag(high, self.epsilon), _flag(share, self.output_share),
                    self.n_texts,
                )  # fmt: skip

    def layer_rows(self) -> Iterator[TableRow]:
        """Yield the rows of `layers`."""
        import numpy as np

        cost, share = self.cost(), self.look("output_share")
        for row, layer in enumerate(self.layers):
            present = ~np.isnan(cost[row])
            if not present.any():
                yield layer, *([None] * 10), 0, self.n_texts
                continue
            idle, low, high = self._idle_interval(row, present)
            costs = cost[row][present]
            shares = _shares(costs < self.epsilon, share[row][present], self.output_share)
            largest = int(np.nanargmax(cost[row]))
            yield (
                layer, idle, low, high, float(costs.mean() < self.epsilon), *shares, float(costs.mean()),
                float(cost[row, largest]), largest, int(present.sum()), self.n_texts,
            )  # fmt: skip

    def _idle_interval(
        self, row: int, present: np.ndarray
    ) -> tuple[float | None, float | None, float | None]:
        """Return the share of heads of a layer that are idle by loss, with its interval over texts."""
        import numpy as np

        from phaselens.uncertainty import mean_interval

        weights = np.broadcast_to(self.n_predicted[:, None, None], (self.n_texts, 1, int(present.sum())))
        changes = self.changes[:, row][:, None, present]
        sums = np.concatenate([changes * weights, weights], 1)
        interval = mean_interval(
            sums,
            transform=lambda means: (means[..., 0, :] / means[..., 1, :] < self.epsilon).mean(-1),
            seed=self.seed,
        )
        idle, low, high = (bound.tolist() for bound in interval)
        return idle, low, high

    def summary_rows(self) -> Iterator[TableRow]:
        """Yield the row of `summary`."""
        import numpy as np

        cost = self.cost()
        present = ~np.isnan(cost)
        if not present.any():
            yield *([None] * 5), 0, self.n_texts
            return
        highs = np.array(
            [
                [
                    np.nan if record is None or record["delta_high"] is None else record["delta_high"]
                    for record in row
                ]
                for row in self.records
            ],
            dtype=np.float64,
        )
        sure = None if np.isnan(highs[present]).any() else float((highs[present] < self.epsilon).mean())
        is_idle = cost[present] < self.epsilon
        shares = _shares(is_idle, self.look("output_share")[present], self.output_share)
        yield float(is_idle.mean()), sure, *shares, int(present.sum()), self.n_texts


def _flag(value: CellValue, limit: float) -> int | None:
    """Return 1 for a value below the limit, 0 for another one, None for a missing one."""
    return int(value < limit) if isinstance(value, int | float) else None


def _shares(is_idle: np.ndarray, output_share: np.ndarray, limit: float) -> tuple[float | None, ...]:
    """Return the shares of heads that are idle by output, that are idle both ways, and that would be by chance."""
    import numpy as np

    if np.isnan(output_share).any():
        return None, None, None
    is_quiet = output_share < limit
    return (
        float(is_quiet.mean()),
        float((is_idle & is_quiet).mean()),
        float(is_idle.mean() * is_quiet.mean()),
    )


def rank_rows(costs: HeadCosts, seed: int, warn: Callable[[str], None]) -> Iterator[TableRow]:
    """Yield the rows of `ranks`; `warn` receives the reason for a missing correlation."""
    import numpy as np

    from phaselens.uncertainty import mean_interval, rank_correlation, spearman

    cost = costs.cost()
    for name in QUANTITIES:
        look, by_text = costs.look(name), costs.looks[name]
        present = ~np.isnan(cost) & ~np.isnan(look)
        n_heads = int(present.sum())
        correlation = rank_correlation(cost[present], look[present], seed=seed)
        if correlation.value is None:
            warn(f"the rank correlation with {name} is missing: {correlation.reason}")
            yield name, None, None, None, None, None, n_heads, costs.n_texts
            continue
        changes, looks = costs.changes[:, present], by_text[:, present]
        weights = np.broadcast_to(costs.n_predicted[:, None], changes.shape)
        has_look = ~np.isnan(looks)
        # Sums, of which each resample makes its own means: token-weighted costs, and looks of the texts that have one.
        sums = np.stack([changes * weights, weights, np.where(has_look, looks, 0.0), has_look], 1)

        def correlate(means: np.ndarray) -> np.ndarray:
            with np.errstate(invalid="ignore"):  # a resample of texts without a look
                resampled_look = means[..., 2, :] / means[..., 3, :]
            return np.asarray(spearman(means[..., 0, :] / means[..., 1, :], resampled_look))

        _, low, high = mean_interval(sums, transform=correlate, n_resamples=N_RESAMPLES, seed=seed)
        yield (
            name, correlation.value, none_if_nan(_number(low)), none_if_nan(_number(high)), 0.0, correlation.p_value,
            n_heads, costs.n_texts,
        )  # fmt: skip


def _number(bound: Any) -> float:
    value = bound.tolist()
    return float("nan") if value is None else float(value)


def draw_heads(tables: Mapping[str, Table], figure: Figure) -> None:
    """Draw each head's cost against its sink score, its entropy and its output share."""
    figure.set_size_inches(10.5, 3.8)
    by_model = records_by_model(tables["heads"])
    panels = figure.subplots(1, 3, squeeze=False, sharey=True)[0]
    figure.set_layout_engine("constrained")
    labels = {
        "sink": "attention on position 0",
        "entropy": "entropy of attention / maximum",
        "output_share": "‖z·W_O‖ over the layer's mean",
    }
    for axes, (column, title) in zip(panels, labels.items(), strict=True):
        for label, style in styles(list(by_model)).items():
            records = by_model[label]
            axes.plot(
                numbers(records, column), numbers(records, "delta_nats"), label=escaped(label),
                **{**style, "linewidth": 0, "alpha": 0.7},
            )  # fmt: skip
        axes.axhline(0.0, color=INK, linewidth=0.6)
        axes.set_xlabel(title)
        bare(axes)
    panels[0].set_ylabel("Δ nats per token without the head")
    panels[0].legend(frameon=False, fontsize=8)
