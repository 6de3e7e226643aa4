"""Balance of what attention and the MLP of a layer add to the residual stream.

A few massive tokens dominate a mean over tokens, so shares are taken token by token and split into position 0, other
massive rows and the rest. Two large outputs can cancel, so attention's projection on the layer's total change is
reported beside the norms.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from phaselens.plugin import Column, Display, Metric, TableSpec, hookimpl
from phaselens_plugins._common import N_TEXTS, LayerText, Numbers, TableRow, mean_or_none
from phaselens_plugins._layer_metric import (
    NO_PROBLEM,
    NOT_FINITE,
    SHORT,
    ZERO,
    Quantity,
    layer_tables,
    missing_record,
)
from phaselens_plugins._residual import RESIDUAL, ResidualMetric, RowParams

if TYPE_CHECKING:
    from torch import Tensor

ATTN_OUT, MLP_OUT = "hook_attn_out", "hook_mlp_out"
SHARE = "share of norm"
OF_CHANGE = "share of change"
EVEN = "outputs of equal norm"
ALIGNED = "outputs of the same norms at right angles"
QUANTITIES = (
    Quantity("share", SHARE, "‖attention‖ / (‖attention‖ + ‖MLP‖) of each token, mean over all tokens", EVEN),
    Quantity("share_bos", SHARE, "share at position 0", EVEN),
    Quantity("share_massive", SHARE, "share, mean over massive rows other than position 0", EVEN),
    Quantity("share_rest", SHARE, "share, mean over all other rows", EVEN),
    Quantity(
        "share_of_means", SHARE, "mean ‖attention‖ over the sum of mean ‖attention‖ and mean ‖MLP‖", EVEN
    ),
    Quantity("projection", OF_CHANGE, "⟨attention, change⟩ / ‖change‖², median over tokens", ALIGNED),
    Quantity("projection_bos", OF_CHANGE, "projection at position 0", ALIGNED),
    Quantity(
        "projection_rest",
        OF_CHANGE,
        "projection, median over tokens that are neither BOS nor massive",
        ALIGNED,
    ),
    Quantity("attn_norm", "norm", "norm of what attention adds, mean over tokens"),
    Quantity("attn_median", "norm", "norm of what attention adds, median over tokens"),
    Quantity("mlp_norm", "norm", "norm of what the MLP adds, mean over tokens"),
    Quantity("mlp_median", "norm", "norm of what the MLP adds, median over tokens"),
    Quantity("n_massive", "tokens", "massive rows other than position 0"),
)


class LayerBalance(ResidualMetric[RowParams]):
    """Metric of attention's share of what each layer adds, by text and layer."""

    name = "layer-balance"
    version = "1"
    title = "attention against MLP"
    description = "attention's share of what each layer adds to the residual stream"
    citation = "norms by token, split by massive rows (Sun et al. 2024, arXiv:2402.17762)"
    Params = RowParams
    quantities = QUANTITIES
    explained = "share"
    points = (ATTN_OUT, MLP_OUT, RESIDUAL)
    tables = (
        *layer_tables(QUANTITIES),
        TableSpec(
            "summary",
            (
                Column("share", float, SHARE, "mean over texts and layers of the tokens' mean"),
                Column("share_bos", float, SHARE, "mean over texts and layers of the share at position 0"),
                Column(
                    "share_rest",
                    float,
                    SHARE,
                    "mean over texts and layers, without position 0 and massive rows",
                ),
                Column(
                    "share_pooled", float, SHARE, "norms summed over layers first, then the share of means"
                ),
                Column("projection", float, OF_CHANGE, "mean over texts and layers of the tokens' median"),
                N_TEXTS,
            ),
            "one row per model",
        ),
    )
    display = Display(
        value="share",
        title="attention share",
        low="ci_low",
        high="ci_high",
        null="null",
        summary=(
            ("share", "average"),
            ("share_bos", "at BOS"),
            ("share_rest", "rest"),
            ("projection", "projection"),
        ),
    )

    @classmethod
    def define(cls, params: RowParams) -> str:
        """State which of the estimators in use is displayed."""
        return (
            "‖attention‖ / (‖attention‖ + ‖MLP‖) token by token, then the mean over all tokens, BOS and massive rows "
            f"(≥ {params.massive_factor:g} × the median norm) included; projection: median over tokens"
        )

    def measure(self, text: LayerText) -> Mapping[str, Numbers]:
        """Measure shares and projections of all tokens and of each group, and the norms of both outputs."""
        import torch

        from phaselens.spectrum import balance, massive_rows, median, row_norms

        outputs = balance(text[ATTN_OUT], text[MLP_OUT])
        norms = row_norms(text[RESIDUAL])
        if not text.n_tokens:
            return missing_record(QUANTITIES, SHORT)
        if not bool(torch.stack([outputs.attn, outputs.mlp, norms]).isfinite().all()):
            return missing_record(QUANTITIES, NOT_FINITE)
        is_massive = massive_rows(norms, self.params.massive_factor)
        is_massive[0] = False
        is_ordinary = ~is_massive
        is_ordinary[0] = False
        groups: dict[str, slice | Tensor] = {
            "": slice(None),
            "_bos": slice(1),
            "_massive": is_massive,
            "_rest": is_ordinary,
        }
        record: dict[str, Numbers] = {"n_massive": float(is_massive.sum())}
        for suffix, rows in groups.items():
            # Tokens to which nothing was added have no share.
            share, projection, unaligned = (
                column[rows][~column[rows].isnan()]
                for column in (outputs.share, outputs.projection, outputs.unaligned)
            )
            record[f"share{suffix}"] = float(share.mean())
            record[f"share{suffix}_null"] = 0.5 if len(share) else float("nan")
            if suffix != "_massive":
                record[f"projection{suffix}"] = median(projection)
                record[f"projection{suffix}_null"] = median(unaligned)
        attn_norm, mlp_norm = float(outputs.attn.mean()), float(outputs.mlp.mean())
        total = attn_norm + mlp_norm
        return record | {
            "share_of_means": attn_norm / total if total else float("nan"),
            "share_of_means_null": 0.5,
            "attn_norm": attn_norm,
            "mlp_norm": mlp_norm,
            "attn_median": median(outputs.attn),
            "mlp_median": median(outputs.mlp),
            "problem": NO_PROBLEM if total else ZERO,
        }

    def summary(self) -> TableRow:
        """Return the mean shares and projection, and the share of norms pooled over layers."""
        import numpy as np

        attn, mlp = self.values("attn_norm").sum(1), self.values("mlp_norm").sum(1)
        share_pooled = np.divide(attn, attn + mlp, out=np.full(attn.shape, np.nan), where=attn + mlp > 0)
        return (
            *(mean_or_none(self.values(name)) for name in ("share", "share_bos", "share_rest")),
            mean_or_none(share_pooled),
            mean_or_none(self.values("projection")),
            self.n_texts("share"),
        )


@hookimpl
def phaselens_metrics() -> list[type[Metric[Any]] | str]:
    """Return the metrics in this file."""
    return [LayerBalance]
