"""A linear probe of position: how much of a token's position can be read from the residual stream, layer by layer.

A model without position encodings has to compute positions, from the causal mask alone (Haviv et al. 2022,
arXiv:2203.16634; Kazemnejad et al. 2023, arXiv:2305.19466). The probe shows in which layer they appear. Ridge
regressions are fitted on some texts and tested on others, and each number has the same number for positions that were
permuted within their text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
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
from phaselens_plugins._causal import content_keys
from phaselens_plugins._common import (
    TableRow,
    generator_for,
    index_of_largest,
    layer_texts,
    mean_intervals,
    none_if_nan,
    null_means,
    quoted_ids,
    store_by_text,
)
from phaselens_plugins._probe_rows import (
    TARGETS,
    LayerProbe,
    SampledText,
    is_usable,
    probe_layer,
)
from phaselens_plugins._probe_tables import PROBE_PANELS, PROBE_TABLES
from phaselens_plugins._residual import RESIDUAL
from phaselens_plugins._ridge import FEWEST_FOLDS

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

EMBEDDED = "hook_resid_pre"
EMBEDDING = -1
"""The number under which the rows before layer 0 are kept."""


@dataclass(frozen=True)
class ProbeParams(Params):
    """Parameters of the metric."""

    rows: int = param(
        64, help="tokens drawn from each text, without position 0, on which the probe is fitted", minimum=2
    )
    folds: int = param(
        4,
        help="folds of texts; each is predicted by a probe fitted on the others, which also choose its penalty",
        minimum=FEWEST_FOLDS,
    )
    permutations: int = param(
        8, help="permutations of the positions, whose mean is the null", minimum=1, maximum=1000
    )


class PositionProbe(Metric[ProbeParams]):
    """Metric of the position that a linear probe reads from the residual stream, by layer."""

    name = "position-probe"
    version = "1"
    title = "linear probe of position"
    description = "how well a ridge regression on the residual stream predicts a token's position"
    citation = "Haviv et al. 2022, arXiv:2203.16634; Gelberg et al. 2025, arXiv:2512.12167"
    Params = ProbeParams
    tables = PROBE_TABLES
    display = Display(
        value="r2",
        title="R² of t / T",
        low="ci_low",
        high="ci_high",
        null="null",
        strong=0.5,
        strong_means="a linear probe explains half of the variance of t / T, or more",
        also=(
            ("r2_log", "R² of ln(1 + t)"),
            ("adjacency", "adjacency"),
            ("prefix_spread", "prefix spread"),
        ),
        summary=(
            ("r2", "largest"),
            ("r2_layer", "at"),
            ("r2_embedding", "before layer 0"),
        ),
    )
    figure_panels = PROBE_PANELS

    @classmethod
    def define(cls, params: ProbeParams) -> str:
        """State the probe, its folds and its null."""
        return (
            f"ridge regression of t / T on the residual after each layer, {params.rows} tokens of each text (position "
            f"0 excluded), {params.folds} folds of texts, penalty from inner folds; null: positions permuted within "
            "each text"
        )

    def setup(self) -> None:
        """Start without rows."""
        self.sampled: dict[int, SampledText] = {}

    def hooks(self) -> Sequence[str]:
        """Return the residual stream after each layer, and before the first."""
        return [in_layer("{layer}", RESIDUAL), in_layer(0, EMBEDDED)]

    def update(self, layer: LayerView) -> None:
        """Keep the sampled rows of this layer, and measure adjacency and prefix spread of all rows."""
        records = []
        for index, content, text in zip(
            layer.batch.indices, content_keys(layer.batch), layer_texts(layer), strict=True
        ):
            sample = self.sampled.setdefault(
                index, SampledText.draw(content, text.n_tokens, self.params.rows, self.seed)
            )
            sample.rows[layer.index or 0] = _rows_at(text[RESIDUAL], sample.positions)
            record = self._measure(text[RESIDUAL], sample)
            if EMBEDDED in layer:
                sample.rows[EMBEDDING] = _rows_at(text[EMBEDDED], sample.positions)
                record["adjacency_embedding"] = self._measure(text[EMBEDDED], sample)["adjacency"]
            records.append(record)
        store_by_text(self, layer, records)

    def _measure(self, x: Tensor, sample: SampledText) -> dict[str, float]:
        """Return adjacency and prefix spread of the rows without position 0, NaN where there are too few."""
        import torch

        from phaselens.spectrum import adjacency, prefix_spread

        n, missing = max(0, sample.n_tokens - 1), float("nan")
        record = dict.fromkeys(
            ("adjacency", "adjacency_null", "prefix_spread", "prefix_spread_null"), missing
        )
        if n > 1:
            spread = float(prefix_spread(x[1:])[1:].mean())
            null = _mean_random_spread(n)
            record |= {"prefix_spread": spread, "prefix_spread_null": null if spread == spread else missing}
        if n > 2:
            drawn = generator_for(sample.content, self.seed, "partners").integers(0, n - 2, n - 1)
            first = torch.arange(n - 1)
            partners = torch.from_numpy(drawn)
            # Two rows cannot be drawn: the row itself and the next one.
            share = adjacency(x[1:], torch.where(partners < first, partners, partners + 2))
            record |= {"adjacency": share, "adjacency_null": 0.5 if share == share else missing}
        return record

    def merge(self, other: Metric[ProbeParams]) -> None:
        """Merge another instance, with its rows."""
        super().merge(other)
        if isinstance(other, PositionProbe):
            self.sampled |= other.sampled

    def compute(self) -> Mapping[str, Table]:
        """Fit the probes, and return all tables of this model."""
        texts = [self.sampled[index] for index in sorted(self.sampled)]
        options = {
            "n_folds": self.params.folds,
            "n_permutations": self.params.permutations,
            "seed": self.seed,
        }
        probes = {
            layer: probe_layer(texts, layer, **options) for layer in range(EMBEDDING, self.model.n_layers)
        }
        self._explain(texts, probes)
        layers = self.table("layers", self._layer_rows(probes))
        return {
            "texts": self.table("texts", self._text_rows(texts, probes)),
            "layers": layers,
            "summary": self.table("summary", [self._summary_row(layers, probes)]),
            "probes": self.table("probes", _probe_rows(probes)),
        }

    def _text_rows(
        self, texts: Sequence[SampledText], probes: Mapping[int, LayerProbe]
    ) -> Iterator[TableRow]:
        names = ("adjacency", "adjacency_null", "prefix_spread", "prefix_spread_null")
        columns = [self.per_text.stack(name) for name in names]
        for number, text in enumerate(texts):
            for layer in range(self.model.n_layers):
                probe = probes[layer]
                scores = (
                    score[number, target]
                    for target in range(len(TARGETS))
                    for score in (probe.r2, probe.null)
                )
                measured = (column[number, layer] for column in columns)
                yield (
                    self.per_text.texts[number], layer, *map(none_if_nan, scores), *map(none_if_nan, measured),
                    len(text.positions), text.n_tokens,
                )  # fmt: skip

    def _layer_rows(self, probes: Mapping[int, LayerProbe]) -> Iterator[TableRow]:
        import numpy as np

        means: list[list[Any]] = []
        for name in ("adjacency", "prefix_spread"):
            values = self.per_text.stack(name)
            nulls = self.per_text.stack(f"{name}_null")
            means += [*mean_intervals(self, values), null_means(self, nulls, where=~np.isnan(values))]
        for layer in range(self.model.n_layers):
            probe = probes[layer]
            scores = [number for target in range(len(TARGETS)) for number in self._pooled(probe, target)]
            yield layer, *scores, *(column[layer] for column in means), int((probe.spread[:, 0] > 0).sum())

    def _pooled(self, probe: LayerProbe, target: int) -> tuple[float | None, ...]:
        """Return R² of all texts, with its interval over texts, and the null."""
        import numpy as np

        from phaselens.uncertainty import mean_interval

        order = [index for index in self.per_text.by_content if probe.spread[index, target] > 0]
        if not order:
            return None, None, None, None
        sums = np.stack([probe.error[order, target], probe.spread[order, target]], 1)
        interval = mean_interval(
            sums, transform=lambda means: 1 - means[..., :1] / means[..., 1:], seed=self.seed
        )
        return *(bound.tolist()[0] for bound in interval), none_if_nan(probe.pooled_null(target))

    def _summary_row(self, layers: Table, probes: Mapping[int, LayerProbe]) -> TableRow:
        import numpy as np

        best: list[float | int | None] = []
        for name in ("r2", "r2_log"):
            values = np.array(layers.column(name), dtype=np.float64)
            layer = index_of_largest(values)
            best += [None, None] if layer is None else [values[layer], layer]
        embedding = probes[EMBEDDING]
        adjacency = null_means(self, self.per_text.stack("adjacency_embedding")[:, :1])[0]
        n_texts = max((int(n) for n in layers.column("n_texts") if n is not None), default=0)
        return (
            *best, *(self._pooled(embedding, target)[0] for target in range(len(TARGETS))), adjacency, n_texts,
        )  # fmt: skip

    def _explain(self, texts: Sequence[SampledText], probes: Mapping[int, LayerProbe]) -> None:
        """Warn of each reason for which numbers are missing."""
        import numpy as np

        n_tokens = np.array([text.n_tokens for text in texts])
        for name, fewest in (("r2", 3), ("prefix_spread", 3), ("adjacency", 4)):
            if (n_tokens < fewest).any():
                ids = quoted_ids(self.per_text.texts, n_tokens < fewest)
                self.warn(f"{name} is missing: fewer than {fewest} tokens for text {ids}")
        self._explain_probes(texts, probes)
        for name in ("adjacency", "prefix_spread"):
            values = self.per_text.stack(name)
            missing = np.isnan(values) & (n_tokens >= (4 if name == "adjacency" else 3))[:, None]
            for layer in np.flatnonzero(missing.any(0)):
                ids = quoted_ids(self.per_text.texts, missing[:, layer])
                self.warn(
                    f"{name} is missing: rows are zero, NaN or infinite in layer {layer} for text {ids}"
                )

    def _explain_probes(self, texts: Sequence[SampledText], probes: Mapping[int, LayerProbe]) -> None:
        """Warn of texts that the probes do not use, and of layers without a probe."""
        import numpy as np

        usable = {layer: np.array([is_usable(text, layer) for text in texts]) for layer in probes}
        has_rows = np.array([len(text.positions) > 0 for text in texts])
        layers_without: dict[int, list[str]] = {}
        for layer, probe in probes.items():
            name = f"layer {layer}" if layer >= 0 else "the residual stream before layer 0"
            if (has_rows & ~usable[layer]).any():
                ids = quoted_ids(self.per_text.texts, has_rows & ~usable[layer])
                self.warn(f"r2 is missing: activations are NaN or infinite in {name} for text {ids}")
            if probe.fitted is None:
                n_contents = len({text.content for text in np.array(texts, dtype=object)[usable[layer]]})
                layers_without.setdefault(n_contents, []).append(name)
            elif (probe.spread[:, 0] > 0).sum() < 2:
                self.warn("fewer than 2 texts with values: intervals are missing", TOO_FEW_TEXTS)
        for n_contents, names in layers_without.items():
            in_layers = "" if len(names) == len(probes) else f" in {', '.join(names)}"
            self.warn(
                f"r2 is missing{in_layers}: the probe is fitted, chosen and tested on different texts; use "
                f"{FEWEST_FOLDS} texts of different content or more (usable: {n_contents})"
            )


def _rows_at(x: Tensor, positions: np.ndarray) -> np.ndarray:
    """Return rows of x [pos, d_model] as a new array; half precision is widened."""
    import torch

    rows = x[torch.from_numpy(positions).to(x.device)]
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    array: np.ndarray = rows.to(dtype).cpu().numpy()
    return array


def _probe_rows(probes: Mapping[int, LayerProbe]) -> Iterator[TableRow]:
    for layer, probe in probes.items():
        if probe.fitted is None:
            continue
        for target, name in enumerate(TARGETS):
            for fold, result in probe.fitted.folds.items():
                # Targets are [target, 1 + permutation], flattened; the first of each is the real one.
                penalty = result.penalties.reshape(len(TARGETS), -1)[target, 0]
                yield layer, name, fold, penalty, result.n_fitted, result.n_tested


@cache
def _mean_random_spread(n: int) -> float:
    """Return the mean spread of the prefixes of 2 … `n` rows in random directions. The same in every layer."""
    from phaselens.spectrum import random_spread

    return sum(map(random_spread, range(2, n + 1))) / (n - 1)


@hookimpl
def phaselens_metrics() -> list[type[Metric[Any]] | str]:
    """Return the metrics in this file."""
    return [PositionProbe]
