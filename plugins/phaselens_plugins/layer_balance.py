"""What attention and the MLP of a layer add to the residual stream, one against the other.

A mean over tokens is ruled by the few massive ones, so shares are taken token by token and split into
position 0, other massive rows and the rest; and because two large outputs can cancel, there is beside the norms the
projection of each on the layer's own change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from phaselens.plugin import Column, Display, LayerView, Metric, Table, TableSpec, hookimpl
from phaselens_plugins._common import (
    FINE,
    N_TEXTS,
    NOT_FINITE,
    SHORT,
    ZERO,
    Grid,
    RowParams,
    Value,
    grid_tables,
    keep,
    nothing,
    overall,
    real_rows,
)

if TYPE_CHECKING:
    from torch import Tensor

SHARE = "share of norm"
OF_CHANGE = "share of change"
EVEN = "outputs of equal norm"
ALIGNED = "outputs of the same norms at right angles"
VALUES = (
    Value("share", SHARE, "‖attention‖ / (‖attention‖ + ‖MLP‖) of each token, mean over all tokens", EVEN),
    Value("share_bos", SHARE, "the same at position 0", EVEN),
    Value("share_massive", SHARE, "the same, mean over massive rows other than position 0", EVEN),
    Value("share_rest", SHARE, "the same, mean over the rest", EVEN),
    Value("share_of_means", SHARE, "mean ‖attention‖ over the sum of mean ‖attention‖ and mean ‖MLP‖", EVEN),
    Value("projection", OF_CHANGE, "⟨attention, change⟩ / ‖change‖², median over tokens", ALIGNED),
    Value("projection_bos", OF_CHANGE, "the same at position 0", ALIGNED),
    Value("projection_rest", OF_CHANGE, "the same, median over tokens that are neither", ALIGNED),
    Value("attn_norm", "norm", "norm of what attention adds, mean over tokens"),
    Value("attn_median", "norm", "norm of what attention adds, median over tokens"),
    Value("mlp_norm", "norm", "norm of what the MLP adds, mean over tokens"),
    Value("mlp_median", "norm", "norm of what the MLP adds, median over tokens"),
    Value("n_massive", "tokens", "massive rows other than position 0"),
)


class LayerBalance(Grid[RowParams]):
    """Attention's share of what each layer adds, by text and layer."""

    name = "layer-balance"
    version = "1"
    title = "attention against MLP"
    description = "attention's share of what each layer adds to the residual stream"
    citation = "norms by token, split by massive rows (Sun et al. 2024, arXiv:2402.17762)"
    Params = RowParams
    tables = (
        *grid_tables(VALUES),
        TableSpec(
            "summary",
            (
                Column("share", float, SHARE, "mean over texts and layers of the tokens' mean"),
                Column("share_bos", float, SHARE, "the same at position 0"),
                Column("share_rest", float, SHARE, "the same without position 0 and massive rows"),
                Column(
                    "share_pooled", float, SHARE, "norms summed over layers first, then the share of means"
                ),
                Column("projection", float, OF_CHANGE, "mean over texts and layers of the tokens' median"),
                N_TEXTS,
            ),
            "a row per model",
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
        """Which of the estimators in use is shown."""
        return (
            "‖attention‖ / (‖attention‖ + ‖MLP‖) token by token, then the mean over all tokens, BOS and massive rows "
            f"(≥ {params.massive_factor:g} × the median norm) included; projection: median over tokens"
        )

    def hooks(self) -> Sequence[str]:
        """What attention and MLP add, and the stream after them, whose norms say which rows are massive."""
        return [f"blocks.{{layer}}.{point}" for point in ("hook_attn_out", "hook_mlp_out", "hook_resid_post")]

    def update(self, layer: LayerView) -> None:
        """Shares of this layer for the texts of the batch."""
        parts = [real_rows(layer, point) for point in ("hook_attn_out", "hook_mlp_out", "hook_resid_post")]
        keep(self, layer, [self._one(*rows) for rows in zip(*parts, strict=True)])

    def _one(self, attn_out: Tensor, mlp_out: Tensor, x: Tensor) -> dict[str, float]:
        import torch

        from phaselens.spectrum import balance, massive_rows, median, row_norms

        found = balance(attn_out, mlp_out)
        norms = row_norms(x)
        whole = torch.stack([found.attn, found.mlp, norms])
        if not len(x) or not bool(whole.isfinite().all()):
            return nothing(VALUES, NOT_FINITE if len(x) else SHORT)
        massive = massive_rows(norms, self.params.massive_factor)
        massive[0] = False
        rest = ~massive
        rest[0] = False
        result: dict[str, float] = {"n_massive": float(massive.sum())}
        for name, rows in (("", None), ("_bos", slice(1)), ("_massive", massive), ("_rest", rest)):
            share, projection, unaligned = (
                each if rows is None else each[rows]
                for each in (found.share, found.projection, found.unaligned)
            )
            share, projection, unaligned = (
                each[~each.isnan()] for each in (share, projection, unaligned)
            )  # tokens to which nothing was added have no share
            result[f"share{name}"] = float(share.mean())
            result[f"share{name}_null"] = 0.5 if len(share) else float("nan")
            if name != "_massive":
                result[f"projection{name}"] = median(projection)
                result[f"projection{name}_null"] = median(unaligned)
        means = float(found.attn.mean()), float(found.mlp.mean())
        return result | {
            "share_of_means": means[0] / sum(means) if sum(means) else float("nan"),
            "share_of_means_null": 0.5,
            "attn_norm": means[0],
            "mlp_norm": means[1],
            "attn_median": median(found.attn),
            "mlp_median": median(found.mlp),
            "problem": FINE if sum(means) else ZERO,
        }

    def compute(self) -> Mapping[str, Table]:
        """All tables of this model."""
        import numpy as np

        self.explain("share")
        attn, mlp = (self.values(name).sum(1) for name in ("attn_norm", "mlp_norm"))
        summary = (
            *(overall(self.values(name)) for name in ("share", "share_bos", "share_rest")),
            overall(np.divide(attn, attn + mlp, out=np.full(attn.shape, np.nan), where=attn + mlp > 0)),
            overall(self.values("projection")),
            self.n_texts("share"),
        )
        return {
            "texts": self.texts_table(VALUES),
            "layers": self.layers_table(VALUES),
            "summary": self.table("summary", [summary]),
        }


@hookimpl
def phaselens_metrics() -> list[type[Metric[Any]] | str]:
    """The metrics in this file."""
    return [LayerBalance]
