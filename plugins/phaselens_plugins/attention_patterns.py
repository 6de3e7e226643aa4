"""How attention is spread: entropy of its rows, mass near the diagonal, concentration of what keys receive.

A query sees the keys up to its own, in a layer with a sliding window only the last so many of them, and every mean is
over queries that see what it is about. A learned sink's column is no key: weights are taken as the model uses them, and
where a learned sink takes its part, those of a row sum to less than 1.

Nothing here holds a query × key matrix. The classes of heads come twice: with the overlap of their tests removed, and
as a published study assigns them, whose "local" counts position 0 and whose entropy is that of the last row over T.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from phaselens.plugin import Column, Display, LayerView, Metric, Params, Table, TableSpec, hookimpl, param
from phaselens_plugins._common import (
    FINE,
    HEAD,
    LAYER,
    N_TEXTS,
    NOT_FINITE,
    SHORT,
    Grid,
    Value,
    cell,
    grid_tables,
    interval_columns,
    intervals,
    keep,
    overall,
)

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

SHARE = "share of attention"
UNIFORM = "uniform attention"
POINTS = ("hook_entropy", "hook_sink", "hook_received", "hook_distance")
VALUES = (
    Value("entropy", "nats",
          "−Σ p ln p of a query's weights on keys, mean over all queries, the first (0) included; a learned sink's "
          "share is left out, not spread over the keys", UNIFORM),
    Value("entropy_normalised", "share of maximum",
          "entropy over ln(keys seen), mean over queries that see two or more; a learned sink is no key", UNIFORM),
    Value("concentration", "0 to 1",
          "1 + Σ c ln c / ln T of the shares c of all T queries' attention that keys receive; 1 also where a learned "
          "sink takes all", UNIFORM),
    Value("sink", SHARE, "on position 0, mean over the queries ≥ 1 that see it", UNIFORM),
    Value("local", SHARE, "on the keys just before the query, position 0 left out, mean over queries ≥ 1", UNIFORM),
    Value("itself", SHARE, "on the query's own position, mean over queries ≥ 1", UNIFORM),
    Value("local_with_bos", SHARE, "as local, position 0 counted where it is that near", UNIFORM),
)  # fmt: skip
CLASSES = ("sink", "local", "distributed", "mixed")


@dataclass(frozen=True)
class PatternParams(Params):
    """What the metric can be asked for."""

    local_width: int = param(5, help="keys before the query that count as local", unit="keys", minimum=1)
    distances: int = param(
        64, help="distances 0 … n − 1 of the profile", unit="keys", minimum=1, maximum=4096
    )
    sink_threshold: float = param(
        0.3, help="a sink head's mass on position 0", unit=SHARE, minimum=0, maximum=1
    )
    local_threshold: float = param(0.3, help="a local head's local mass", unit=SHARE, minimum=0, maximum=1)
    distributed_threshold: float = param(
        0.7, help="a distributed head's normalised entropy", unit="share of maximum", minimum=0, maximum=1
    )


class AttentionPatterns(Grid[PatternParams]):
    """Entropy, concentration, local mass and class of every head, and attention by distance."""

    name = "attention-patterns"
    version = "2"
    title = "attention patterns"
    description = "entropy of attention, mass near the diagonal, classes of heads, attention by distance"
    citation = "Queipo-de-Llano et al. 2025, arXiv:2510.06477 (mixing score, ColSum concentration)"
    Params = PatternParams
    tables = (
        *grid_tables(VALUES, heads=True),
        TableSpec(
            "classes",
            (
                LAYER,
                HEAD,
                Column("class", str, None, "sink, local, distributed or mixed: the first whose test is met"),
                Column(
                    "class_study", str, None, "as the study assigns it: see entropy_last and local_with_bos"
                ),
                Column("sink", float, SHARE, "mean over texts"),
                Column("local", float, SHARE, "mean over texts, position 0 left out"),
                Column("local_with_bos", float, SHARE, "mean over texts, as the study has it"),
                Column("entropy_normalised", float, "share of maximum", "mean over texts"),
                Column(
                    "entropy_last", float, "nats", "entropy of the last query over T, the study's entropy"
                ),
                Column("null", str, None, "class of uniform attention at these lengths"),
            ),
            "what kind of head it is, by its means over texts",
        ),
        TableSpec(
            "class_counts",
            (
                LAYER,
                *(Column(kind, int, "heads", "overlap removed") for kind in CLASSES),
                *(Column(f"{kind}_study", int, "heads", "as the study assigns it") for kind in CLASSES),
            ),
            "heads of each class by layer",
        ),
        TableSpec(
            "profile",
            (
                LAYER,
                Column("distance", int, "keys", "0 is the query's own position"),
                Column("attention", float, SHARE, "mean over queries that see such a key, heads and texts"),
                *interval_columns(SHARE),
                Column("null", float, SHARE, UNIFORM),
                N_TEXTS,
            ),
            "attention by distance; null where no text is that long, and beyond the layer's window",
        ),
        TableSpec(
            "summary",
            (
                Column("entropy", float, "nats", "mean over texts, layers and heads"),
                Column("entropy_normalised", float, "share of maximum", "mean over texts, layers and heads"),
                Column("concentration", float, "0 to 1", "mean over texts, layers and heads"),
                *(Column(f"{kind}_heads", float, "share of heads", "overlap removed") for kind in CLASSES),
                N_TEXTS,
            ),
            "a row per model",
        ),
    )
    display = Display(
        value="entropy_normalised",
        title="entropy",
        low="entropy_normalised_low",
        high="entropy_normalised_high",
        null="entropy_normalised_null",
        also=(("local", "local"),),
        summary=(
            ("entropy", "nats"),
            ("sink_heads", "sink"),
            ("local_heads", "local"),
            ("distributed_heads", "distrib."),
            ("mixed_heads", "mixed"),
        ),
        by_head="entropy_normalised",
    )

    @classmethod
    def define(cls, params: PatternParams) -> str:
        """Which entropy, which neighbours, which classes."""
        return (
            "entropy over ln(keys seen: those up to the query, within the layer's window), mean over queries that see "
            "two or more; "
            f"local: {params.local_width} keys before the query, itself and BOS left out; classes, first met: sink ≥ "
            f"{params.sink_threshold:g}, local ≥ {params.local_threshold:g}, "
            f"entropy ≥ {params.distributed_threshold:g}, else mixed"
        )

    def hooks(self) -> Sequence[str]:
        """Row entropies, received mass, mass on position 0 and mass by distance."""
        return [f"blocks.{{layer}}.attn.{point}" for point in POINTS]

    @property
    def n_distances(self) -> int:
        """The profile's, or the neighbours' and the query's own."""
        return max(self.params.distances, self.params.local_width + 1)

    def update(self, layer: LayerView) -> None:
        """Patterns of this layer for the texts of the batch."""
        entropy, sink, received, profile = (layer.float64(f"attn.{point}") for point in POINTS)
        index = layer.index or 0
        keep(
            self,
            layer,
            [
                self._one(index, entropy[row, :, :n], sink[row, :, :n], received[row, :, :n], profile[row])
                for row, n in enumerate(layer.batch.lengths)
            ],
        )

    def _one(
        self, index: int, entropy: Tensor, sink: Tensor, received: Tensor, profile: Tensor
    ) -> dict[str, Any]:
        """entropy, sink and received [head, pos] and profile [head, distance] (sums over queries) of one text."""
        import torch

        from phaselens.attention import concentration, normalised_entropy, sink_score

        n_heads, n = entropy.shape
        width, window = self.params.local_width, self.model.windows[index]
        finite = all(bool(each.isfinite().all()) for each in (entropy, sink, received, profile))
        if n < 2 or not finite:
            return _nothing(SHORT if n < 2 else NOT_FINITE, n_heads, self.params.distances)
        normalised = normalised_entropy(entropy, window=window)
        with_bos = profile[:, 1 : width + 1].sum(-1) / (n - 1)
        near_bos = sink[:, 1 : width + 1].sum(-1) / (n - 1)
        lengths = torch.tensor([n])
        heads = {
            "entropy": entropy.mean(-1),
            # A window of 1 leaves a query no choice, so no entropy to normalise.
            "entropy_normalised": normalised[:, ~normalised[0].isnan()].mean(-1),
            "concentration": concentration(received[None], lengths)[0],
            "sink": sink_score(sink[None], lengths, window=window)[0],
            "local": with_bos - near_bos,
            # Without query 0, which gives its key 1, or less beside a learned sink.
            "itself": (profile[:, 0] - sink[:, 0]) / (n - 1),
            "local_with_bos": with_bos,
            "entropy_last": entropy[:, -1] / n,
        }
        counts = torch.arange(n, n - profile.shape[1], -1, device=entropy.device).clamp(min=0)
        counts[window or n :] = 0
        null = uniform_pattern(n, window, width)
        chance = torch.nn.functional.pad(null["profile"], (0, profile.shape[1]))[: profile.shape[1]]
        by_distance = torch.where(counts > 0, profile.mean(0) / counts, torch.nan)
        base = torch.where(counts.cpu() > 0, chance / counts.cpu(), torch.nan)
        return {
            **{name: values.tolist() for name, values in heads.items()},
            **{f"{value.name}_null": float(null[value.name]) for value in VALUES},
            "profile": by_distance[: self.params.distances].tolist(),
            "profile_null": base[: self.params.distances].tolist(),
            "problem": FINE,
        }

    def compute(self) -> Mapping[str, Table]:
        """All tables of this model."""
        self.explain("entropy")
        self._explain_windows()
        kinds = list(self._classes())
        return {
            "texts": self.texts_table(VALUES),
            "layers": self.layers_table(VALUES),
            "heads": self.heads_table(VALUES),
            "classes": self.table("classes", kinds),
            "class_counts": self.table("class_counts", self._counts(kinds)),
            "profile": self.table("profile", self._profile()),
            "summary": self.table("summary", [self._summary(kinds)]),
        }

    def _explain_windows(self) -> None:
        """Say what windows leave nothing of."""
        single = [str(layer) for layer, window in enumerate(self.model.windows) if window == 1]
        if single:
            self.warn(
                f"sink, entropy_normalised and class are null in layer {', '.join(single)}: with a window of 1, a "
                "query sees itself only"
            )

    def _classes(self) -> Iterator[tuple[Any, ...]]:
        import numpy as np

        names = ("sink", "local", "local_with_bos", "entropy_normalised", "entropy_last")
        means = {name: _over_texts(self.values(name)) for name in names}
        nulls = {name: _over_texts(self.values(f"{name}_null")) for name in names[:4]}
        for layer, head in np.ndindex(means["sink"].shape):
            at = {name: float(values[layer, head]) for name, values in means.items()}
            if at["sink"] != at["sink"]:
                yield layer, head, None, None, *([None] * 6)
                continue
            middle = float(np.median(means["entropy_last"][layer]))
            kind = self._class(
                at["sink"], at["local"], at["entropy_normalised"] >= self.params.distributed_threshold
            )
            study = self._class(at["sink"], at["local_with_bos"], at["entropy_last"] > middle)
            chance = self._class(float(nulls["sink"][layer]), float(nulls["local"][layer]), True)
            yield layer, head, kind, study, *(cell(at[name]) for name in names), chance

    def _class(self, sink: float, local: float, is_distributed: bool) -> str:
        if sink >= self.params.sink_threshold:
            return "sink"
        if local >= self.params.local_threshold:
            return "local"
        return "distributed" if is_distributed else "mixed"

    def _counts(self, kinds: Sequence[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
        for layer in sorted({row[0] for row in kinds}):
            mine = [row for row in kinds if row[0] == layer]
            known = mine[0][2] is not None
            counts = [sum(row[place] == kind for row in mine) for place in (2, 3) for kind in CLASSES]
            yield layer, *(counts if known else [None] * len(counts))

    def _profile(self) -> Iterator[tuple[Any, ...]]:
        import numpy as np

        found, null = self.per_text.stack("profile"), self.per_text.stack("profile_null")
        present = ~np.isnan(found)
        mean, low, high = intervals(self, found)
        base = intervals(self, null, where=present, n_resamples=1)[0]
        n_texts = present.sum(0)
        for layer, distance in np.ndindex(n_texts.shape):
            numbers = (each[layer][distance] for each in (mean, low, high, base))
            yield layer, distance, *numbers, n_texts[layer, distance]

    def _summary(self, kinds: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
        known = [row[2] for row in kinds if row[2] is not None]
        return (
            *(overall(self.values(name)) for name in ("entropy", "entropy_normalised", "concentration")),
            *(known.count(kind) / len(known) if known else None for kind in CLASSES),
            self.n_texts("entropy"),
        )


@lru_cache(maxsize=1024)
def uniform_pattern(n_tokens: int, window: int | None, width: int) -> dict[str, Tensor]:
    """Every value of uniform attention at that length (two tokens or more), and `profile` [distance], in queries."""
    import torch

    from phaselens.attention import (
        concentration,
        uniform_distance,
        uniform_entropy,
        uniform_received,
        uniform_sink,
        uniform_window,
    )

    profile = uniform_distance(n_tokens, window)
    received = uniform_received(n_tokens, window)[None, None]
    local, with_bos = (
        uniform_window(n_tokens, width, exclude_first=first, window=window).sum() / (n_tokens - 1)
        for first in (True, False)
    )
    single = window == 1
    return {
        "entropy": torch.tensor(uniform_entropy(n_tokens, window)),
        "entropy_normalised": torch.tensor(torch.nan if single else 1.0),
        "concentration": concentration(received, torch.tensor([n_tokens]))[0, 0],
        "sink": torch.tensor(torch.nan if single else uniform_sink(n_tokens, window=window)),
        "local": local,
        "itself": (profile[0] - 1.0) / (n_tokens - 1),
        "local_with_bos": with_bos,
        "profile": profile,
    }


def _over_texts(values: np.ndarray) -> np.ndarray:
    """Mean over the texts that have a value; NaN where none has."""
    import numpy as np

    present = ~np.isnan(values)
    total, count = np.where(present, values, 0.0).sum(0), present.sum(0)
    mean: np.ndarray = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    return mean


def _nothing(problem: int, n_heads: int, n_distances: int) -> dict[str, Any]:
    blank = float("nan")
    names = [*(value.name for value in VALUES), "entropy_last"]
    return {
        **dict.fromkeys(names, [blank] * n_heads),
        **{f"{value.name}_null": blank for value in VALUES},
        "profile": [blank] * n_distances,
        "profile_null": [blank] * n_distances,
        "problem": problem,
    }


@hookimpl
def phaselens_metrics() -> list[type[Metric[Any]] | str]:
    """The metrics in this file."""
    return [AttentionPatterns]
