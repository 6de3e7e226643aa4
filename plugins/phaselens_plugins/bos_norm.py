"""The norm that the residual stream has at position 0, against all other positions.

Queipo-de-Llano et al. 2025 (arXiv:2510.06477), section 3. "The spike layer" has three definitions in use that
name different layers of the same model; they stand side by side here, each under its own name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from phaselens.plugin import Column, Display, LayerView, Metric, Table, TableSpec, hookimpl
from phaselens_plugins._common import (
    FINE,
    LAYER,
    N_TEXTS,
    NOT_FINITE,
    SHORT,
    TEXT,
    TOKEN,
    TOKEN_ID,
    ZERO,
    Grid,
    RowParams,
    Value,
    best,
    grid_tables,
    keep,
    real_rows,
)

ABOVE = 2.0
"""The ratio that `spike_layer_first_ratio_above_2` looks for."""
MOST = 8
"""Massive tokens listed for a text and layer."""

VALUES = (
    Value("bos_norm", "norm", "norm of the residual stream at position 0, after the layer",
          "mean norm at the other positions: what position 0 would have if it were one of them"),
    Value("bos_ratio", "ratio", "bos_norm over the mean norm of the other positions",
          "position 0 drawn like any other"),
    Value("bos_ratio_median", "ratio", "bos_norm over the median norm of the other positions",
          "position 0 drawn like any other"),
    Value("bos_change", "norm", "what the layer adds to bos_norm"),
    Value("n_massive", "tokens", "positions other than 0 whose norm is massive"),
)  # fmt: skip


class BosNorm(Grid[RowParams]):
    """Norm of position 0 by text and layer, its ratios, the layers where it spikes, and other massive tokens."""

    name = "bos-norm"
    version = "1"
    title = "BOS norm"
    description = "norm of the residual stream at position 0, against the other positions"
    citation = "Queipo-de-Llano et al. 2025, arXiv:2510.06477"
    Params = RowParams
    tables = (
        *grid_tables(VALUES),
        TableSpec(
            "summary",
            (
                Column("peak", float, "norm", "largest bos_norm of all layers, mean over texts"),
                Column("peak_layer", int, "index", "the layer that has it"),
                Column("spike_layer_argmax_ratio", int, "index", "the layer whose mean bos_ratio is largest"),
                Column(
                    "spike_layer_first_ratio_above_2",
                    int,
                    "index",
                    "the first whose mean bos_ratio exceeds 2",
                ),
                Column(
                    "write_layer",
                    int,
                    "index",
                    "the layer that adds most to bos_norm; null where none adds to it",
                ),
                Column("peak_ratio", float, "ratio", "largest mean bos_ratio"),
                N_TEXTS,
            ),
            "a row per model",
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
            f"massive rows other than BOS, the largest {MOST} of a text and layer",
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

    @classmethod
    def define(cls, params: RowParams) -> str:
        """Which of the definitions in use the shown columns follow."""
        return (
            "‖x₀‖ over the mean ‖x_t‖, t ≥ 1, after each layer (last: before the final norm); at: layer of the peak "
            "norm; argmax and first > 2: of the ratio; write: largest increase of ‖x₀‖; "
            f"massive rows: {params.massive_factor:g} × the median norm"
        )

    def setup(self) -> None:
        """Words of the massive tokens, by id."""
        super().setup()
        self.words: dict[int, str] = {}

    def merge(self, other: Metric[RowParams]) -> None:
        """Also the words that `other` met."""
        super().merge(other)
        if isinstance(other, BosNorm):
            self.words |= other.words

    def hooks(self) -> Sequence[str]:
        """The residual stream after each layer, and before the first."""
        return ["blocks.{layer}.hook_resid_post", "blocks.0.hook_resid_pre"]

    def update(self, layer: LayerView) -> None:
        """Norms of this layer for the texts of the batch."""
        found = [self._one(layer, row, rows) for row, rows in enumerate(real_rows(layer, "hook_resid_post"))]
        if "hook_resid_pre" in layer:
            before = [_first_norm(rows) for rows in real_rows(layer, "hook_resid_pre")]
            found = [one | {"embedded": norm} for one, norm in zip(found, before, strict=True)]
        keep(self, layer, found)

    def _one(self, layer: LayerView, row: int, x: Any) -> dict[str, Any]:
        import torch

        from phaselens.spectrum import bos_norm, massive_rows, row_norms

        norms = row_norms(x)
        bos = bos_norm(norms)
        # Other rows decide what is massive among them, and row 0 is not listed.
        massive = massive_rows(norms, self.params.massive_factor)
        massive[:1] = False
        at = massive.nonzero()[:, 0]
        at = at[norms[at].argsort(descending=True)][:MOST]
        ids = layer.batch.tokens[row, at].tolist()
        self.words.update({token: layer.batch.spell(token) for token in ids if token not in self.words})
        finite = bool(norms.isfinite().all())
        blank = float("nan")
        chance = 1.0 if finite and len(x) > 1 else blank
        problem = NOT_FINITE if not finite else SHORT if len(x) < 2 else FINE if bos.others else ZERO
        room = torch.full((4, MOST), torch.nan, dtype=torch.float64)
        room[:, : len(at)] = torch.stack(
            [at.cpu(), torch.tensor(ids), norms[at].cpu(), (norms[at] / bos.others_median).cpu()]
        )
        return {
            "bos_norm": bos.norm if finite else blank,
            "bos_norm_null": bos.others if finite else blank,
            "bos_ratio": bos.ratio if finite else blank,
            "bos_ratio_null": chance,
            "bos_ratio_median": bos.ratio_median if finite else blank,
            "bos_ratio_median_null": chance,
            "n_massive": int(massive.sum()) if finite else blank,
            "problem": problem,
            "massive": room.tolist(),
        }

    def compute(self) -> Mapping[str, Table]:
        """All tables of this model."""
        import numpy as np

        norms = self.values("bos_norm")
        before = np.concatenate([self.values("embedded")[:, :1], norms[:, :-1]], axis=1)
        self.derived["bos_change"] = norms - before
        self.explain("bos_ratio")
        return {
            "texts": self.texts_table(VALUES),
            "layers": self.layers_table(VALUES),
            "summary": self.table("summary", [self._summary()]),
            "massive_tokens": self.table("massive_tokens", self._massive()),
        }

    def _summary(self) -> tuple[Any, ...]:
        import numpy as np

        norm, ratio = self.mean_by_layer("bos_norm"), self.mean_by_layer("bos_ratio")
        change = self.mean_by_layer("bos_change")
        peak, spike = best(norm), best(ratio)
        above = np.flatnonzero(ratio > ABOVE)
        write = best(change)
        if write is not None and not change[write] > 0:
            write = None
            self.warn("write_layer is null: no layer adds to the norm of position 0")
        return (
            None if peak is None else norm[peak],
            peak,
            spike,
            above[0] if above.size else None,
            write,
            None if spike is None else ratio[spike],
            self.n_texts("bos_norm"),
        )

    def _massive(self) -> Iterator[tuple[Any, ...]]:
        import numpy as np

        found = self.per_text.stack("massive")
        for text, layer in np.ndindex(found.shape[:2]):
            for position, token, norm, ratio in found[text, layer].T:
                if position == position:
                    word = self.words[int(token)]
                    yield self.per_text.texts[text], layer, position, word, token, norm, ratio


def _first_norm(x: Any) -> float:
    """Norm of row 0; NaN where it is missing or not finite."""
    from phaselens.spectrum import row_norms

    norm = float(row_norms(x[:1]).sum()) if len(x) else float("nan")
    return norm if norm < float("inf") else float("nan")


@hookimpl
def phaselens_metrics() -> list[type[Metric[Any]] | str]:
    """The metrics in this file."""
    return [BosNorm]
