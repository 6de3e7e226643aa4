"""Use of rotary frequencies: norms of queries and keys by rotated pair, and each pair's share of the scores.

A rotation turns pairs of dimensions, each at its own speed. Fast pairs can compare positions; pairs that turn less than
once in the trained length hardly depend on position and can carry content (Barbero et al. 2024, arXiv:2410.06205). The
rotation keeps the norm of a pair, so use can be compared between a model and its copy without rotation, whose pairs are
called unrotated. METRICS 10.4.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phaselens.plugin import (
    Display,
    LayerView,
    Metric,
    Params,
    RotatedPairs,
    Table,
    hookimpl,
    in_layer,
    param,
)
from phaselens_plugins._causal import content_keys
from phaselens_plugins._common import (
    LayerText,
    Numbers,
    TableRow,
    layer_texts,
    mean_intervals,
    mean_or_none,
    none_if_nan,
    null_means,
    store_by_text,
)
from phaselens_plugins._frequency_figure import draw_frequencies
from phaselens_plugins._frequency_tables import (
    BANDS,
    QUANTITIES,
    TABLES,
    bands_of,
    period_of,
    positions_of,
)
from phaselens_plugins._layer_metric import NO_PROBLEM, NOT_FINITE, ZERO, LayerMetric

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from torch import Tensor

POINTS = {"q": "attn.hook_rot_q", "k": "attn.hook_rot_k"}
#: Numbers stored for each pair.
BY_PAIR = ("q_norm", "k_norm", "use", "score")
UNROTATED_LAYER = 9
"""Code of the problem that a layer has no rotated pairs; explained by `_explain_layers`."""


@dataclass(frozen=True)
class FrequencyParams(Params):
    """Parameters of the metric."""

    multiple: float = param(5.0, help="a cell is massive above this many times the mean cell", minimum=0)
    samples: int = param(
        256, help="pairs of a query and a key that it sees, drawn in each text for the scores", minimum=1
    )


class RopeFrequencies(LayerMetric[FrequencyParams]):
    """Metric of the use of rotated pairs by layer and head, by pair, and by band of frequencies."""

    name = "rope-frequencies"
    version = "1"
    title = "use of rotary frequencies"
    description = (
        "norms of queries and keys by rotated pair, shares of the score, massive cells by frequency band"
    )
    citation = "Barbero et al. 2024, arXiv:2410.06205"
    Params = FrequencyParams
    quantities = QUANTITIES
    tables = TABLES
    display = Display(
        value="low",
        title="low",
        low="ci_low",
        high="ci_high",
        null="null",
        percent=True,
        also=(("middle", "middle"), ("high", "high"), ("score_low", "score, low")),
        summary=(("low", "low"), ("middle", "middle"), ("high", "high"), ("rotation", "pairs")),
        by_head="low",
    )
    plots = True

    @classmethod
    def define(cls, params: FrequencyParams) -> str:
        """State the use of a pair, and the bands."""
        return (
            "use of a rotated pair: mean ‖q‖ · mean ‖k‖ in its two dimensions, over the sum over pairs, by head; low: "
            "period over the trained length, high: period under 8, middle: the others; null: share of the pairs"
        )

    def hooks(self) -> Sequence[str]:
        """Return the points of queries and keys after the rotation."""
        return [in_layer("{layer}", point) for point in POINTS.values()]

    def update(self, layer: LayerView) -> None:
        """Measure this layer for the texts of the batch."""
        keys = content_keys(layer.batch)
        records = [self._measure(text, keys[text.index]) for text in layer_texts(layer)]
        store_by_text(self, layer, records)

    def rotation(self, layer: int) -> RotatedPairs | None:
        """Return the layer's rotated pairs; None without any."""
        rotation = self.model.rotations[layer] if self.model.rotations else None
        return rotation if rotation is not None and rotation.pairs else None

    @property
    def n_pairs(self) -> int:
        """The largest number of pairs of a layer, to which all layers' numbers are padded."""
        rotations = (self.rotation(layer) for layer in range(self.model.n_layers))
        return max((len(rotation.pairs) for rotation in rotations if rotation is not None), default=1)

    def _bands(self, layer: int) -> list[str | None]:
        rotation = self.rotation(layer)
        n_trained = self.model.n_ctx_trained or self.model.n_ctx
        return [] if rotation is None else bands_of(rotation, n_trained)

    def _measure(self, text: LayerText, content: str) -> dict[str, Numbers]:
        import torch

        from phaselens.attention import all_finite

        layer = text.layer.index or 0
        rotation = self.rotation(layer)
        if rotation is None:
            return self._missing(layer, UNROTATED_LAYER)
        q, k = (text[POINTS[tensor]] for tensor in ("q", "k"))
        if not (all_finite(q) and all_finite(k)):
            return self._missing(layer, NOT_FINITE)
        q, k = (states if states.dtype == torch.float64 else states.float() for states in (q, k))
        group = q.shape[1] // k.shape[1]
        low, high = zip(*rotation.pairs, strict=True)
        norms = {
            tensor: torch.hypot(_dimensions_at(states, low), _dimensions_at(states, high)).mean(
                0, dtype=torch.float64
            )
            for tensor, states in (("q", q), ("k", k))
        }
        by_head = norms["q"] * norms["k"].repeat_interleave(group, 0)
        use = _shares(by_head)
        score = _shares(self._sampled_scores(q, k, group, low, high, content, layer))
        record: dict[str, Numbers] = {
            "q_norm": self._padded(norms["q"].mean(0)),
            "k_norm": self._padded(norms["k"].mean(0)),
            "use": self._padded(use.mean(0)),
            "score": self._padded(score.mean(0)),
            **self._massive(q, k, layer),
        }
        bands = self._bands(layer)
        has_bands = None not in bands
        for band, indices in positions_of(bands):
            for name, shares in ((band, use), (f"score_{band}", score)):
                values = shares[:, indices].sum(-1) if has_bands else torch.full_like(shares[:, 0], torch.nan)
                record[name] = values.tolist()
                record[f"{name}_null"] = len(indices) / len(bands) if has_bands else float("nan")
        is_zero = bool(use.isnan().any()) or bool(score.isnan().any())
        return {**record, "problem": ZERO if is_zero else NO_PROBLEM}

    def _missing(self, layer: int, problem: int) -> dict[str, Numbers]:
        missing = float("nan")
        by_head = {quantity.name: [missing] * self.model.n_heads_in(layer) for quantity in QUANTITIES}
        nulls = dict.fromkeys((f"{quantity.name}_null" for quantity in QUANTITIES), missing)
        by_pair = {name: [missing] * self.n_pairs for name in BY_PAIR}
        cells = {
            f"{kind}_{tensor}": [missing] * len(BANDS)
            for kind in ("cells", "cells_null")
            for tensor in POINTS
        }
        return {**by_head, **nulls, **by_pair, **cells, "problem": problem}

    def _padded(self, values: Tensor) -> list[float]:
        """Return the numbers of a layer's pairs, padded with NaN to the largest number of pairs."""
        numbers: list[float] = values.tolist()
        return [*numbers, *([float("nan")] * (self.n_pairs - len(numbers)))]

    def _sampled_scores(
        self,
        q: Tensor,
        k: Tensor,
        group: int,
        low: Sequence[int],
        high: Sequence[int],
        content: str,
        layer: int,
    ) -> Tensor:
        """Return the mean |q·k| in each pair, [head, pair], over sampled pairs of a query and a key that it sees.

        The draw depends on the text, the layer and the seed alone.
        """
        import numpy as np
        import torch

        digest = hashlib.sha256(f"{self.seed} {layer} {content}".encode()).digest()
        generator = np.random.default_rng(int.from_bytes(digest[:8]))
        window = self.model.windows[layer] or len(q)
        query = generator.integers(0, len(q), self.params.samples)
        first_key = np.maximum(0, query + 1 - window)
        key = generator.integers(first_key, query + 1)
        queries, keys = (
            states[torch.from_numpy(rows).to(states.device)].double()
            for states, rows in ((q, query), (k, key))
        )
        keys = keys.repeat_interleave(group, 1)
        low_products, high_products = (
            _dimensions_at(queries, dimensions) * _dimensions_at(keys, dimensions)
            for dimensions in (low, high)
        )
        return (low_products + high_products).abs().mean(0)

    def _massive(self, q: Tensor, k: Tensor, layer: int) -> dict[str, Numbers]:
        """Return the massive cells of q and k in each band, and the expected number for Gaussian values."""
        from phaselens.attention import gaussian_massive_share, massive_cells, norm_matrix

        rotation, bands = self.rotation(layer), self._bands(layer)
        assert rotation is not None
        record: dict[str, Numbers] = {}
        for tensor, states in (("q", q), ("k", k)):
            norms = norm_matrix(states)
            if None in bands or not bool((norms > 0).any()):
                record[f"cells_{tensor}"] = record[f"cells_null_{tensor}"] = [float("nan")] * len(BANDS)
                continue
            cells = massive_cells(norms, self.params.multiple).sum(0)
            share = gaussian_massive_share(len(states), self.params.multiple)
            dimensions = [
                [dimension for index in indices for dimension in rotation.pairs[index]]
                for _, indices in positions_of(bands)
            ]
            record[f"cells_{tensor}"] = [float(cells[columns].sum()) for columns in dimensions]
            record[f"cells_null_{tensor}"] = [share * len(columns) * len(norms) for columns in dimensions]
        return record

    def compute(self) -> Mapping[str, Table]:
        """Return all tables of this model."""
        self.explain("use")
        self._explain_layers()
        return {
            "texts": self.texts_table(),
            "heads": self.heads_table(),
            "layers": self.layers_table(),
            "pairs": self.table("pairs", self._pair_rows()),
            "massive": self.table("massive", self._massive_rows()),
            "measured": self.table("measured", self._measured_rows()),
            "summary": self.table("summary", [self._summary()]),
        }

    def _explain_layers(self) -> None:
        """Warn of layers without pairs, and of bands that cannot be told, with the reason."""
        reasons: dict[str, list[str]] = {}
        for layer in self.model.attention_layers:
            rotation = self.model.rotations[layer] if self.model.rotations else None
            if rotation is None:
                reason = "queries and keys are not rotated there"
            elif rotation.problem is not None:
                reason = f"the rotation could not be read: {rotation.problem}"
            elif not rotation.pairs:
                reason = "the rotation turns no pair"
            elif None in self._bands(layer):
                self.warn(f"bands are missing in layer {layer}: the angles of its pairs are unknown")
                continue
            else:
                continue
            reasons.setdefault(reason, []).append(str(layer))
        for reason, layers in reasons.items():
            self.warn(f"use is missing in layer {', '.join(layers)}: {reason}")
        if self.model.n_ctx_trained is None and self.model.n_ctx is None:
            self.warn(
                "no pair is in the low band: the checkpoint does not state the length that it was trained for"
            )

    def _state(self, layer: int) -> str:
        """Return whether the layer's pairs are rotated."""
        return "rotated" if "rope" in self.model.positions[layer] else "unrotated"

    def _pair_rows(self) -> Iterator[TableRow]:
        import numpy as np

        stacks = {name: self.per_text.stack(name) for name in BY_PAIR}
        columns = {name: mean_intervals(self, stack) for name, stack in stacks.items()}
        n_texts = (~np.isnan(stacks["use"])).sum(0)
        for layer in range(self.model.n_layers):
            rotation = self.rotation(layer)
            if rotation is None:
                continue
            for index, ((low, high), band) in enumerate(zip(rotation.pairs, self._bands(layer), strict=True)):
                angle = rotation.angles[index] if band is not None else None
                yield (
                    layer, index, low, high, self._state(layer), angle,
                    period_of(angle) if angle else None, band,
                    columns["q_norm"][0][layer][index], columns["k_norm"][0][layer][index],
                    *(bound[layer][index] for bound in columns["use"]), 1 / len(rotation.pairs),
                    *(bound[layer][index] for bound in columns["score"]), n_texts[layer, index],
                )  # fmt: skip

    def _massive_rows(self) -> Iterator[TableRow]:
        import numpy as np

        for tensor in POINTS:
            cells, nulls = (self.per_text.stack(f"{kind}_{tensor}") for kind in ("cells", "cells_null"))
            means, lows, highs = mean_intervals(self, cells)
            null = null_means(self, nulls, where=~np.isnan(cells))
            n_texts = (~np.isnan(cells)).sum(0)
            for layer in range(cells.shape[1]):
                bands = self._bands(layer)
                if not bands or None in bands:
                    continue
                total = sum(mean for mean in means[layer] if mean is not None)
                for index, (band, indices) in enumerate(positions_of(bands)):
                    mean = means[layer][index]
                    yield (
                        layer, tensor, band, len(indices), mean, lows[layer][index], highs[layer][index],
                        null[layer][index], mean / total if mean is not None and total else None,
                        len(indices) / len(bands), n_texts[layer, index],
                    )  # fmt: skip

    def _measured_rows(self) -> Iterator[TableRow]:
        stacks = [self.per_text.stack(name) for name in BY_PAIR]
        for text, (text_id, length) in enumerate(
            zip(self.per_text.texts, self.per_text.lengths, strict=True)
        ):
            for layer in range(self.model.n_layers):
                for index, band in enumerate(self._bands(layer)):
                    cells = (none_if_nan(stack[text, layer, index]) for stack in stacks)
                    yield text_id, layer, index, band, *cells, length

    def _summary(self) -> TableRow:
        layers = [layer for layer in range(self.model.n_layers) if self.rotation(layer) is not None]
        states = {self._state(layer) for layer in layers}
        n_trained = self.model.n_ctx_trained or self.model.n_ctx
        return (
            *(mean_or_none(self.values(band)) for band in BANDS),
            mean_or_none(self.values("low_null")),
            (states.pop() if len(states) == 1 else "both") if states else None,
            n_trained,
            self._n_measured(),
        )

    def _n_measured(self) -> int:
        """Return the number of texts with a value in some layer."""
        import numpy as np

        values: np.ndarray = self.per_text.stack("use")
        return int((~np.isnan(values)).any((1, 2)).sum())

    @classmethod
    def plot(cls, tables: Mapping[str, Table], figure: Figure) -> None:
        """Draw use and score by period, and massive cells by band, one line per model."""
        draw_frequencies(tables, figure)


def _dimensions_at(states: Tensor, dimensions: Sequence[int]) -> Tensor:
    """Return these dimensions of states […, d_head]: where they are evenly spaced, a view, which takes a sixth of the
    time of a copy."""
    first, step = dimensions[0], dimensions[1] - dimensions[0] if len(dimensions) > 1 else 1
    stop = first + step * len(dimensions)
    if step > 0 and tuple(dimensions) == tuple(range(first, stop, step)):
        return states[..., first:stop:step]
    return states[..., list(dimensions)]


def _shares(values: Tensor) -> Tensor:
    """Divide values [head, pair] by their sums over pairs; NaN where a sum is 0."""
    import torch

    totals = values.sum(-1, keepdim=True)
    return torch.where(totals > 0, values / totals, torch.nan)


@hookimpl
def phaselens_metrics() -> list[type[Metric[Any]] | str]:
    """Return the metrics in this file."""
    return [RopeFrequencies]
