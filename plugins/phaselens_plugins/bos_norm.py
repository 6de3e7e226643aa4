"""Norm of the residual stream at position 0, compared with the other positions.

Queipo-de-Llano et al. 2025 (arXiv:2510.06477), section 3. Three definitions of "the spike layer" are in use, which
select different layers of the same model; the table `summary` has all three.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from phaselens.plugin import Column, Display, FigurePanel, Metric, Table, TableSpec, hookimpl, in_layer
from phaselens_plugins._common import (
    LAYER,
    N_TEXTS,
    STUDY,
    TEXT,
    LayerText,
    Numbers,
    TableRow,
    index_of_largest,
)
from phaselens_plugins._layer_metric import NO_PROBLEM, NOT_FINITE, SHORT, ZERO, Quantity, layer_tables
from phaselens_plugins._residual import RESIDUAL, TOKEN, TOKEN_ID, RowParams, TokenListingMetric

if TYPE_CHECKING:
    from torch import Tensor

SPIKE_RATIO = 2.0
"""The ratio that `spike_layer_first_ratio_above_2` looks for."""
MAX_LISTED = 8
"""Massive tokens listed for a text and layer."""
EMBEDDED = "hook_resid_pre"

QUANTITIES = (
    Quantity("bos_norm", "norm", "norm of the residual stream at position 0, after the layer",
             "mean norm at the other positions: what position 0 would have if it were one of them"),
    Quantity("bos_ratio", "ratio", "bos_norm over the mean norm of the other positions",
             "the ratio if position 0 were like any other"),
    Quantity("bos_ratio_median", "ratio", "bos_norm over the median norm of the other positions",
             "the ratio if position 0 were like any other"),
    Quantity("bos_change", "norm", "what the layer adds to bos_norm"),
    Quantity("n_massive", "tokens", "positions other than 0 whose norm is massive"),
)  # fmt: skip


class BosNorm(TokenListingMetric[RowParams]):
    """Metric of the norm of position 0 by text and layer, its ratios and spike layers, and other massive tokens."""

    name = "bos-norm"
    version = "1"
    title = "BOS norm"
    description = "norm of the residual stream at position 0, against the other positions"
    citation = "Queipo-de-Llano et al. 2025, arXiv:2510.06477"
    Params = RowParams
    quantities = QUANTITIES
    explained = "bos_ratio"
    tables = (
        *layer_tables(QUANTITIES),
        TableSpec(
            "summary",
            (
                Column("peak", float, "norm", "largest bos_norm of all layers, mean over texts"),
                Column("peak_layer", int, "index", "the layer of the peak"),
                Column("spike_layer_argmax_ratio", int, "index", "the layer whose mean bos_ratio is largest"),
                Column(
                    "spike_layer_first_ratio_above_2",
                    int,
                    "index",
                    "the first layer whose mean bos_ratio exceeds 2",
                ),
                Column(
                    "write_layer",
                    int,
                    "index",
                    "the layer that adds most to bos_norm; missing where none adds to it",
                ),
                Column("peak_ratio", float, "ratio", "largest mean bos_ratio"),
                N_TEXTS,
            ),
            "one row per model",
        ),
        TableSpec(
            "massive_tokens",
            (
                TEXT,
                LAYER,
                Column("position", int, "index", "not 0"),
                TOKEN,
                TOKEN_ID,
                Column("norm", float, "norm", "norm of the residual stream"),
                Column("ratio_median", float, "ratio", "over the median norm of the positions other than 0"),
            ),
            f"massive rows other than BOS, the largest {MAX_LISTED} of a text and layer",
        ),
    )
    display = Display(
        value="bos_ratio",
        title="BOS ratio",
        low="bos_ratio_low",
        high="bos_ratio_high",
        null="bos_ratio_null",
        strong=10.0,
        strong_means="position 0 has 10 times the mean norm of the others, or more",
        summary=(
            ("peak", "peak norm"),
            ("peak_layer", "at"),
            ("spike_layer_argmax_ratio", "argmax"),
            ("spike_layer_first_ratio_above_2", "first > 2"),
            ("write_layer", "write"),
        ),
    )

    figure_panels = (
        FigurePanel(
            STUDY, "bos-norm", Display("bos_norm", "BOS norm", low="ci_low", high="ci_high", null="null")
        ),
    )

    @classmethod
    def define(cls, params: RowParams) -> str:
        """State the definitions of the displayed columns."""
        return (
            "‖x₀‖ over the mean ‖x_t‖, t ≥ 1, after each layer (last: before the final norm); at: layer of the peak "
            "norm; argmax and first > 2: of the ratio; write: largest increase of ‖x₀‖; "
            f"massive rows: {params.massive_factor:g} × the median norm"
        )

    def hooks(self) -> Sequence[str]:
        """Return the points of the residual stream after each layer, and before the first."""
        return [*super().hooks(), in_layer(0, EMBEDDED)]

    def measure(self, text: LayerText) -> Mapping[str, Numbers]:
        """Measure norm and ratios of position 0, and the massive tokens: position, id, norm and ratio, each [rank]."""
        import torch

        from phaselens.spectrum import bos_norm, massive_rows, row_norms

        norms = row_norms(text[RESIDUAL])
        bos = bos_norm(norms)
        # All rows decide which rows are massive; row 0 is not listed.
        is_massive = massive_rows(norms, self.params.massive_factor)
        is_massive[:1] = False
        positions = is_massive.nonzero()[:, 0]
        positions = positions[norms[positions].argsort(descending=True)][:MAX_LISTED]
        token_ids = self.listed_ids(text, positions)
        listed = torch.full((4, MAX_LISTED), torch.nan, dtype=torch.float64)
        listed[:, : len(positions)] = torch.stack(
            [
                positions.cpu(),
                torch.tensor(token_ids),
                norms[positions].cpu(),
                (norms[positions] / bos.others_median).cpu(),
            ]
        )
        is_finite = bool(norms.isfinite().all())
        if not is_finite:
            problem = NOT_FINITE
        elif text.n_tokens < 2:
            problem = SHORT
        else:
            problem = NO_PROBLEM if bos.others_mean else ZERO
        missing = float("nan")
        null_ratio = 1.0 if is_finite and text.n_tokens > 1 else missing
        record: dict[str, Numbers] = {
            "bos_norm": bos.norm if is_finite else missing,
            "bos_norm_null": bos.others_mean if is_finite else missing,
            "bos_ratio": bos.ratio if is_finite else missing,
            "bos_ratio_null": null_ratio,
            "bos_ratio_median": bos.ratio_median if is_finite else missing,
            "bos_ratio_median_null": null_ratio,
            "n_massive": int(is_massive.sum()) if is_finite else missing,
            "problem": problem,
            "massive": listed.tolist(),
        }
        if EMBEDDED in text.layer:
            record["embedded"] = _first_norm(text[EMBEDDED])
        return record

    def compute(self) -> Mapping[str, Table]:
        """Return all tables of this model."""
        import numpy as np

        norms = self.values("bos_norm")
        norms_before = np.concatenate([self.values("embedded")[:, :1], norms[:, :-1]], axis=1)
        self.derived["bos_change"] = norms - norms_before
        return {**super().compute(), "massive_tokens": self.table("massive_tokens", self._massive_tokens())}

    def summary(self) -> TableRow:
        """Return the peak norm and ratio, and the layers that the definitions of "the spike layer" name."""
        import numpy as np

        norm, ratio = self.mean_by_layer("bos_norm"), self.mean_by_layer("bos_ratio")
        change = self.mean_by_layer("bos_change")
        peak_layer, spike_layer = index_of_largest(norm), index_of_largest(ratio)
        spiking_layers = np.flatnonzero(ratio > SPIKE_RATIO)
        write_layer = index_of_largest(change)
        if write_layer is not None and not change[write_layer] > 0:
            write_layer = None
            self.warn("write_layer is missing: no layer adds to the norm of position 0")
        return (
            None if peak_layer is None else norm[peak_layer],
            peak_layer,
            spike_layer,
            spiking_layers[0] if spiking_layers.size else None,
            write_layer,
            None if spike_layer is None else ratio[spike_layer],
            self.n_texts("bos_norm"),
        )

    def _massive_tokens(self) -> Iterator[TableRow]:
        import numpy as np

        listed = self.per_text.stack("massive")
        for text, layer in np.ndindex(listed.shape[:2]):
            for position, token_id, norm, ratio in listed[text, layer].T:
                if position == position:
                    token = self.spellings[int(token_id)]
                    yield self.per_text.texts[text], layer, position, token, token_id, norm, ratio


def _first_norm(x: Tensor) -> float:
    """Return the norm of row 0; NaN where it is missing or not finite."""
    from phaselens.spectrum import row_norms

    norm = float(row_norms(x[:1]).sum()) if len(x) else float("nan")
    return norm if norm < float("inf") else float("nan")


@hookimpl
def phaselens_metrics() -> list[type[Metric[Any]] | str]:
    """Return the metrics in this file."""
    return [BosNorm]
