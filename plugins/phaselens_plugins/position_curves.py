"""Loss, sink mass, entropy, norm and cosine with BOS as functions of position, across and beyond the trained length.

A mean over a whole text hides where in the text a model changes. Here values are averaged in bins of positions that
double in width, so that every octave of context counts the same. A text's mean over the positions of a bin is taken
first; means and intervals are then over the texts that reach the bin.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phaselens.plugin import (
    TOO_FEW_TEXTS,
    Display,
    LayerView,
    Metric,
    Params,
    Table,
    hookimpl,
    in_layer,
    param,
)
from phaselens_plugins._common import (
    LayerText,
    Numbers,
    TableRow,
    layer_texts,
    mean_intervals,
    none_if_nan,
    null_means,
    quoted_ids,
    store_by_text,
)
from phaselens_plugins._position_bins import PositionBins, pooled_means
from phaselens_plugins._position_tables import QUANTITIES, TABLES, draw_curves
from phaselens_plugins._residual import RESIDUAL

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from torch import Tensor

SINK, ENTROPY, LOSS = "attn.hook_sink", "attn.hook_entropy", "hook_loss"


@dataclass(frozen=True)
class CurveParams(Params):
    """Parameters of the metric."""

    per_octave: int = param(
        1, help="bins for each doubling of the position", unit="bins", minimum=1, maximum=16
    )


class PositionCurves(Metric[CurveParams]):
    """Metric of loss, sink mass, entropy, norm and cosine with position 0, in bins of positions."""

    name = "position-curves"
    version = "1"
    title = "curves by position"
    description = (
        "loss, sink mass, entropy, norm and cosine with BOS by position, beyond the trained length too"
    )
    citation = (
        "Gu et al. 2024, arXiv:2410.10781 (sinks); Queipo-de-Llano et al. 2025, arXiv:2510.06477 (norms)"
    )
    Params = CurveParams
    tables = TABLES
    display = Display(
        table="bins",
        rows="condition",
        row_title="positions",
        before=(("loss", "loss"),),
        value="sink",
        title="sink",
        low="sink_low",
        high="sink_high",
        null="sink_null",
        also=(
            ("entropy", "entropy"),
            ("norm", "‖x‖"),
            ("cosine", "cos x₀"),
            ("beyond", "beyond"),
            ("n_texts", "texts"),
        ),
        summary=(
            ("n_ctx_trained", "trained for"),
            ("loss_within", "loss within"),
            ("loss_beyond", "loss beyond"),
        ),
    )
    plots = True

    @classmethod
    def define(cls, params: CurveParams) -> str:
        """State the bins and the order of the means."""
        bins = "2^j to 2^(j+1) − 1" if params.per_octave == 1 else f"{params.per_octave} per doubling"
        return (
            f"bins of positions: {bins}; a text's mean over the bin first, then the mean over the texts that reach it; "
            "loss of the token at the position; sink and entropy: mean over heads (and layers)"
        )

    def setup(self) -> None:
        """Make the bins."""
        self.bins = PositionBins(self.params.per_octave)

    def hooks(self) -> Sequence[str]:
        """Return the points of losses, sink mass, entropy and the residual stream."""
        return [LOSS, *(in_layer("{layer}", point) for point in (SINK, ENTROPY, RESIDUAL))]

    def update(self, layer: LayerView) -> None:
        """Average the values of this layer, or the losses, in bins, text by text."""
        measure = self._measure_losses if layer.index is None else self._measure
        store_by_text(self, layer, [measure(text) for text in layer_texts(layer)])

    def _measure_losses(self, text: LayerText) -> Mapping[str, Numbers]:
        # A loss that is infinite or NaN makes its bin missing: it is not averaged away.
        loss = text.layer.float64(LOSS)[text.index, : text.n_tokens].cpu()
        means, counts = self._binned(loss)
        return {"loss": means, "n_losses": counts}

    def _measure(self, text: LayerText) -> Mapping[str, Numbers]:
        import torch

        from phaselens.attention import normalised_entropy, uniform_sink_rows
        from phaselens.spectrum import row_cosines, row_norms

        n, window = text.n_tokens, self.model.windows[text.layer.index or 0]
        sink, entropy = (
            text.layer.float64(point)[text.index, :, :n].mean(0).cpu() for point in (SINK, ENTROPY)
        )
        x = text[RESIDUAL]
        norms = row_norms(x).cpu()
        sees_first = torch.ones(n, dtype=torch.bool)
        if window is not None:
            sees_first[window:] = False
        null = torch.where(sees_first, uniform_sink_rows(n, window), torch.nan)
        normalised = normalised_entropy(entropy, window=window)
        values = {
            "sink": torch.where(sees_first, sink, torch.nan),
            "sink_null": null,
            "entropy": normalised,
            "entropy_null": torch.where(
                normalised_entropy(torch.ones(n), window=window).isnan(), torch.nan, 1.0
            ),
            "norm": norms,
            "cosine": row_cosines(x, x[0]).cpu(),
        }
        is_finite = {
            "sink": sink.isfinite().all(),
            "entropy": entropy.isfinite().all(),
            "norm": norms.isfinite().all(),
            "cosine": norms.isfinite().all(),
        }
        record: dict[str, Numbers] = {"is_finite": float(all(map(bool, is_finite.values())))}
        for name, row in values.items():
            # One value that is not finite makes the whole text missing, as in the other metrics.
            is_usable = bool(is_finite[name.removesuffix("_null")])
            record[name] = self._binned(row if is_usable else torch.full_like(row, torch.nan))[0]
        return record

    def _binned(self, values: Tensor) -> tuple[list[float], list[float]]:
        means, counts = self.bins.means(values)
        return means.tolist(), counts.tolist()

    def compute(self) -> Mapping[str, Table]:
        """Return all tables of this model."""
        self._explain()
        stacks = {
            name: self.per_text.stack(name) for quantity in QUANTITIES for name in quantity.stored_names
        }
        self.loss, self.n_losses = self.per_text.stack("loss")[:, 0], self.per_text.stack("n_losses")[:, 0]
        return {
            "texts": self.table("texts", self._text_rows(stacks)),
            "losses": self.table("losses", self._loss_rows()),
            "layers": self.table("layers", self._layer_rows(stacks)),
            "bins": self.table("bins", self._bin_rows(stacks)),
            "summary": self.table("summary", [self._summary(stacks)]),
        }

    @property
    def _n_bins(self) -> int:
        """The number of bins that a text reaches."""
        return self.bins.n_reached(max(self.per_text.lengths))

    def _n_positions(self, length: int, index: int) -> int:
        first, last = self.bins.bounds(index)
        return max(0, min(length, last + 1) - first)

    def _explain(self) -> None:
        """Warn of missing values, with the reason."""
        import numpy as np

        text_ids, lengths = self.per_text.texts, np.array(self.per_text.lengths)
        if (lengths < 2).any():
            self.warn(f"curves are missing: only one token in text {quoted_ids(text_ids, lengths < 2)}")
        windows = sorted({window for window in self.model.windows if window is not None})
        for window in windows:
            if (lengths > window).any():
                layers = ", ".join(
                    str(layer) for layer, width in enumerate(self.model.windows) if width == window
                )
                self.warn(
                    f"sink is missing from position {window} on in layer {layers}: its window of {window} keys hides "
                    "position 0 from later queries"
                )
            if window == 1:
                self.warn("entropy is missing where a query sees only itself (a window of 1)")
        is_missing = self.per_text.stack("is_finite") == 0
        if is_missing.any():
            layers = ", ".join(map(str, np.flatnonzero(is_missing.any(0))))
            ids = quoted_ids(text_ids, is_missing.any(1))
            self.warn(f"curves are missing: activations are NaN or infinite in layer {layers} for text {ids}")
        loss = self.per_text.stack("loss")[:, 0]
        lacks_loss = np.isnan(loss).all(1) & (lengths > 1)
        lacks_loss |= np.isinf(loss).any(1)
        if lacks_loss.any():
            self.warn(
                f"loss is missing: logits are NaN or infinite for text {quoted_ids(text_ids, lacks_loss)}"
            )
        if (lengths > 1).sum() == 1:
            self.warn("fewer than 2 texts with curves: intervals are missing", TOO_FEW_TEXTS)
        elif len({self.bins.n_reached(length) for length in lengths.tolist()}) > 1:
            n_reached = [self.bins.n_reached(length) for length in lengths.tolist()]
            if n_reached.count(max(n_reached)) == 1:
                first, _ = self.bins.bounds(sorted(n_reached)[-2])
                self.warn(
                    f"only one text reaches position {first}: later bins have no interval", TOO_FEW_TEXTS
                )
        if self.model.n_ctx_trained is None:
            self.warn("beyond is missing: the checkpoint does not state the length that it was trained for")

    def _text_rows(self, stacks: Mapping[str, np.ndarray]) -> Iterator[TableRow]:
        n_layers = next(iter(stacks.values())).shape[1]
        for text, (text_id, length) in enumerate(
            zip(self.per_text.texts, self.per_text.lengths, strict=True)
        ):
            for layer in range(n_layers):
                for index in range(self.bins.n_reached(length)):
                    cells = (none_if_nan(stack[text, layer, index]) for stack in stacks.values())
                    yield text_id, layer, *self.bins.bounds(index), *cells, self._n_positions(length, index)

    def _loss_rows(self) -> Iterator[TableRow]:
        for text, (text_id, length) in enumerate(
            zip(self.per_text.texts, self.per_text.lengths, strict=True)
        ):
            for index in range(self.bins.n_reached(length)):
                loss = none_if_nan(self.loss[text, index])
                yield text_id, *self.bins.bounds(index), loss, self._n_positions(length, index)

    def _columns_of(self, stacks: Mapping[str, np.ndarray]) -> list[Any]:
        """Return mean, low, high and null (if any) of each quantity, each [...] of stacks [text, ...]."""
        import numpy as np

        columns = []
        for quantity in QUANTITIES:
            values = stacks[quantity.name]
            columns += mean_intervals(self, values)
            if quantity.null:
                columns.append(null_means(self, stacks[f"{quantity.name}_null"], where=~np.isnan(values)))
        return columns

    def _layer_rows(self, stacks: Mapping[str, np.ndarray]) -> Iterator[TableRow]:
        import numpy as np

        columns, n_texts = self._columns_of(stacks), (~np.isnan(stacks["norm"])).sum(0)
        for layer in range(n_texts.shape[0]):
            for index in range(self._n_bins):
                cells = (column[layer][index] for column in columns)
                beyond = self.bins.beyond(index, self.model.n_ctx_trained)
                yield layer, *self.bins.bounds(index), beyond, *cells, n_texts[layer, index]

    def _bin_rows(self, stacks: Mapping[str, np.ndarray]) -> Iterator[TableRow]:
        import numpy as np

        n_trained = self.model.n_ctx_trained
        columns = self._columns_of({name: _mean_over_layers(stack) for name, stack in stacks.items()})
        finite_loss = np.where(np.isfinite(self.loss), self.loss, np.nan)
        losses = mean_intervals(self, finite_loss)
        n_texts = (~np.isnan(finite_loss)).sum(0)
        for index in range(self._n_bins):
            n_positions = sum(self._n_positions(length, index) for length in self.per_text.lengths)
            yield (
                self.bins.label(index), None, *self.bins.bounds(index),
                self.bins.beyond(index, n_trained), *(column[index] for column in losses),
                math.log(self.model.d_vocab), *(column[index] for column in columns), n_texts[index], n_positions,
            )  # fmt: skip

    def _summary(self, stacks: Mapping[str, np.ndarray]) -> TableRow:
        import numpy as np

        n_trained = self.model.n_ctx_trained
        beyond = [self.bins.beyond(index, n_trained) for index in range(self._n_bins)]
        within_bins = [index for index, share in enumerate(beyond) if share in (None, 0.0)]
        beyond_bins = [index for index, share in enumerate(beyond) if share == 1.0]
        if any(share is not None and 0 < share < 1 for share in beyond):
            self.warn(
                f"the bin across the trained length, {n_trained}, counts as neither within nor beyond in the summary; "
                "a greater per_octave makes it narrower"
            )
        sink = _mean_over_layers(stacks["sink"])
        counts = np.where(np.isnan(sink), 0.0, 1.0) * self._counts()
        means = [
            none_if_nan(_mean(pooled_means(values, weights, bins)))
            for values, weights in ((self.loss, self.n_losses), (sink, counts))
            for bins in (within_bins, beyond_bins)
        ]
        return n_trained, *means, int((~np.isnan(self.loss).all(1)).sum())

    def _counts(self) -> np.ndarray:
        """Return the positions of each text in each bin, [text, bin]."""
        import numpy as np

        return np.array(
            [
                [self._n_positions(length, index) for index in range(self.bins.n)]
                for length in self.per_text.lengths
            ],
            dtype=np.float64,
        )

    @classmethod
    def plot(cls, tables: Mapping[str, Table], figure: Figure) -> None:
        """Draw the five curves, one line per model, with the trained lengths as vertical lines."""
        draw_curves(tables, figure)


def _mean(values: np.ndarray) -> float:
    """Return the mean of the values that are not NaN; NaN if there are none."""
    import numpy as np

    present = values[~np.isnan(values)]
    return float(present.mean()) if present.size else float("nan")


def _mean_over_layers(stack: np.ndarray) -> np.ndarray:
    """Return the mean [text, bin] over the layers of stack [text, layer, bin] that have a value."""
    import numpy as np

    present = ~np.isnan(stack)
    total, count = np.where(present, stack, 0.0).sum(1), present.sum(1)
    means: np.ndarray = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    return means


@hookimpl
def phaselens_metrics() -> list[type[Metric[Any]] | str]:
    """Return the metrics in this file."""
    return [PositionCurves]
