"""Where the last queries of a long prompt look: the beginning, the needle, distractors, the recent tokens, the rest.

Prompts are those of `passkey` with distractors, sentences that have other keys. Attention on each segment of keys is
streamed, and so is the key of each query's largest weight, from which the retrieval score of a head follows (Wu et al.
2024, arXiv:2404.15574): how often it looks at the very token that has to be copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phaselens.plugin import (
    TOO_FEW_TEXTS,
    Batch,
    Display,
    InputError,
    LayerView,
    Metric,
    Params,
    Table,
    TokenSequence,
    hookimpl,
    in_layer,
    param,
)
from phaselens_plugins import _common as common
from phaselens_plugins._common import TableRow, mean_intervals, mean_over_texts, null_means
from phaselens_plugins._encoding import PromptEncoder
from phaselens_plugins._passkeys import PasskeyCase, parse_depths, parse_lengths
from phaselens_plugins._segment_figure import draw_cells
from phaselens_plugins._segment_prompts import (
    NAMES,
    NEEDLE_SEGMENT,
    SEGMENTS,
    SegmentPrompt,
    SegmentWriter,
    n_visible,
    uniform_masses,
)
from phaselens_plugins._segment_tables import SEGMENT_PANELS, SEGMENT_TABLES

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

MASS, TOP, LEARNED = "attn.hook_segments", "attn.hook_top_key", "attn.hook_learned_sink"
NEEDLE = SEGMENTS.index(NEEDLE_SEGMENT)
TOTAL_TOLERANCE = 1e-3
"""Largest accepted distance from 1 of a query's attention over all segments and its learned sink."""


@dataclass(frozen=True)
class SegmentsParams(Params):
    """Parameters of the metric."""

    lengths: str = param(
        "n_ctx/2, n_ctx, 2*n_ctx",
        help="tokens of a prompt with its key; n_ctx is the model's context length",
        unit="tokens",
    )
    depths: str = param("0, 0.25, 0.5, 0.75, 1", help="shares of the filler that precede the key")
    n: int = param(2, help="prompts for each length and depth", unit="prompts", minimum=1)
    queries: int = param(8, help="last queries before the answer whose attention is divided", minimum=1)
    distractors: int = param(
        3, help="sentences with other keys in each prompt", unit="sentences", minimum=0, maximum=len(NAMES)
    )
    digits: int = param(5, help="number of symbols of a key", minimum=1, maximum=100)
    symbols: str = param("0123456789", help="the symbols that keys are drawn from")
    threshold: float = param(
        0.1, help="a head is a retrieval head if its score is at least this", minimum=0, maximum=1
    )
    longest: int = param(4096, help="greater lengths are left out, with a warning", unit="tokens", minimum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_lengths(self.lengths, 1 << 20)
        parse_depths(self.depths)
        n_symbols = len(set(self.symbols))
        if n_symbols < max(2, len(self.symbols)) or any(map(str.isspace, self.symbols)):
            raise InputError(
                f"symbols is {self.symbols!r}; give two or more different characters, no white space"
            )
        if n_symbols**self.digits <= self.distractors:
            raise InputError(
                f"{self.digits} of {self.symbols!r} give {n_symbols**self.digits} keys, too few for "
                f"{self.distractors} distractors and the needle"
            )


class Segments(Metric[SegmentsParams]):
    """Metric of the attention of a long prompt's last queries by segment of keys, and of retrieval heads."""

    name = "segments"
    version = "1"
    title = "where the last queries look"
    description = "attention of a long prompt's last queries on its segments, and retrieval heads"
    citation = "Wu et al. 2024, arXiv:2404.15574; the task: Mohtashami and Jaggi 2023, arXiv:2305.16300"
    Params = SegmentsParams
    tables = SEGMENT_TABLES
    display = Display(
        value="needle",
        title="needle",
        low="ci_low",
        high="ci_high",
        null="null",
        also=(
            ("begin", "begin"),
            ("distractors", "distractors"),
            ("recent", "recent"),
            ("rest", "rest"),
            ("retrieval", "retrieval"),
        ),
        summary=(
            ("retrieval", "best head"),
            ("retrieval_layer", "layer"),
            ("retrieval_head", "head"),
            ("retrieval_heads", "heads"),
            ("n_prompts", "prompts"),
        ),
        by_head="retrieval",
    )
    figure_panels = SEGMENT_PANELS
    plots = True

    @classmethod
    def define(cls, params: SegmentsParams) -> str:
        """State the prompts, the queries and the retrieval score."""
        return (
            f"attention of the last {params.queries} queries before the answer, in passkey prompts of {params.lengths} "
            f"tokens with {params.distractors} distractors, {params.n} for each length and depth; retrieval: largest "
            "weight on the token to copy"
        )

    def setup(self) -> None:
        """Start without prompts."""
        self.prompts: dict[str, SegmentPrompt] = {}

    def hooks(self) -> Sequence[str]:
        """Return the streamed statistics of each layer."""
        return [in_layer("{layer}", point) for point in (MASS, TOP, LEARNED)]

    def sequences(self, texts: Batch, tokenizer: Any) -> Sequence[TokenSequence]:
        """Return all prompts that can be made and run."""
        encode = PromptEncoder(tokenizer, bos=self.model.bos, bos_token_id=self.model.bos_token_id)
        writer = SegmentWriter(
            encode,
            digits=self.params.digits,
            symbols=self.params.symbols,
            n_distractors=self.params.distractors,
            seed=self.seed,
        )
        for length in parse_lengths(self.params.lengths, self.model.n_ctx):
            reason = self._reason_to_skip(length)
            for depth in parse_depths(self.params.depths) if not reason else ():
                for number in range(self.params.n):
                    prompt = writer.write(PasskeyCase(length, depth, number))
                    if prompt is None or prompt.scored_from < 1:
                        reason = "shorter than the question with its key and distractors"
                        break
                    self.prompts[prompt.case.id] = prompt
            if reason:
                self.warn(f"prompts of {length} tokens are missing: {reason}")
        if not self.prompts:
            raise InputError(
                f"lengths {self.params.lengths!r}: no prompt of these lengths can be made; give other lengths"
            )
        n_differing = sum(not prompt.is_copied for prompt in self.prompts.values())
        if n_differing:
            self.warn(
                f"in {n_differing} of {len(self.prompts)} prompts the key is tokenized differently in needle and "
                "answer, so they have no retrieval score"
            )
        return [
            TokenSequence(name, prompt.ids, segments=prompt.segments) for name, prompt in self.prompts.items()
        ]

    def _reason_to_skip(self, length: int) -> str:
        is_longer = length > self.params.longest
        too_long = f"more than -P segments.longest={self.params.longest}" if is_longer else ""
        return self.model.reason_against(length) or too_long

    def update(self, layer: LayerView) -> None:
        """Keep what the last queries of each prompt attend to, and how often the largest weight is on the right key."""
        import torch

        records = [
            self._measure(layer, row, self.prompts[name]) for row, name in enumerate(layer.batch.texts)
        ]
        self.per_text.add(
            layer, **{name: torch.stack([record[name] for record in records]) for name in records[0]}
        )

    def _measure(self, layer: LayerView, row: int, prompt: SegmentPrompt) -> dict[str, Any]:
        """Return mass [head, segment], its null [segment], retrieval and ties [head], and the null of retrieval."""
        import torch

        window = self.model.windows[layer.index or 0]
        first = max(0, prompt.scored_from - self.params.queries)
        mass = layer[MASS][row, :, first : prompt.scored_from].double()
        learned = layer[LEARNED][row, :, first : prompt.scored_from].double()
        mass = torch.nn.functional.pad(mass, (0, len(SEGMENTS) - mass.shape[-1]))
        distance = (mass.sum(-1) + learned - 1).abs()
        if bool((distance > TOTAL_TOLERANCE).any()):
            self.warn(
                f"layer {layer.index}: attention over all segments is off from 1 by up to {float(distance.max()):.2g}"
            )
        queries = range(first, prompt.scored_from)
        null = torch.tensor([uniform_masses(prompt.segments, query, window) for query in queries])
        hits, ties, nulls = [], [], []
        top = layer[TOP][row]
        for query in range(prompt.scored_from - 1, len(prompt.ids) - 1):
            key = prompt.copied_position(query)
            if key is None or (window is not None and key <= query - window):
                continue  # the query cannot see the token that it has to copy
            largest, count = top[:, query].double().unbind(-1)
            is_missing = largest.isnan()
            hits.append((largest == key).double().masked_fill(is_missing, torch.nan))
            ties.append((count > 1).double().masked_fill(is_missing, torch.nan))
            nulls.append(1 / n_visible(query, window))
        missing = torch.full_like(mass[:, 0, 0], torch.nan).cpu()
        return {
            "mass": mass.mean(1).cpu(),
            "mass_null": null.double().mean(0),
            "retrieval": torch.stack(hits).mean(0).cpu() if hits else missing,
            "ties": torch.stack(ties).mean(0).cpu() if ties else missing,
            "retrieval_null": torch.tensor(sum(nulls) / len(nulls) if nulls else torch.nan),
        }

    def merge(self, other: Metric[SegmentsParams]) -> None:
        """Merge another instance, with its prompts."""
        super().merge(other)
        if isinstance(other, Segments):
            self.prompts |= other.prompts

    def compute(self) -> Mapping[str, Table]:
        """Return all tables of this model."""
        self.measured = [self.prompts[name] for name in self.per_text.texts]
        self._explain()
        all_prompts = self._selection()
        best = _best_heads(mean_over_texts(self.per_text.stack("retrieval")))
        layers = self.table("layers", self._layer_rows(all_prompts, best))
        return {
            "prompts": self.table("prompts", (prompt.row for prompt in self.measured)),
            "heads": self.table("heads", self._head_rows(all_prompts)),
            "layers": layers,
            "cells": self.table("cells", self._cell_rows(best)),
            "lengths": self.table("lengths", self._length_rows()),
            "summary": self.table("summary", [self._summary_row(layers)]),
        }

    @property
    def _lengths(self) -> list[int]:
        """The requested lengths of the prompts, in order."""
        return list(dict.fromkeys(prompt.case.length for prompt in self.measured))

    def _selection(self, length: int | None = None, depth: float | None = None) -> np.ndarray:
        """Return which prompts have this length and depth, [prompt]."""
        import numpy as np

        return np.array(
            [
                length in (None, prompt.case.length) and depth in (None, prompt.case.depth)
                for prompt in self.measured
            ]
        )

    def _interval(self, values: np.ndarray, chosen: np.ndarray) -> list[Any]:
        """Return mean over the chosen prompts, low and high of values [prompt, …], as nested lists."""
        where = chosen.reshape(-1, *(1 for _ in values.shape[1:])) & (values == values)
        return mean_intervals(self, values, where=where)

    def _mean(self, values: np.ndarray, chosen: np.ndarray) -> list[Any]:
        """Return the mean over the chosen prompts, [...] as nested lists."""
        return null_means(
            self, values, chosen.reshape(-1, *(1 for _ in values.shape[1:])) & (values == values)
        )

    def _masses(self, chosen: np.ndarray, by_head: bool) -> tuple[list[Any], list[Any]]:
        """Return mean, low and high of the needle, each [layer(, head)], and mean and null of each other segment."""
        import numpy as np

        mass, nulls = self.per_text.stack("mass"), self.per_text.stack("mass_null")
        if not by_head:
            mass = np.moveaxis(common.mean_over_heads(self, np.moveaxis(mass, 3, 0)), 0, 2)
        shape = mass.shape[:-1]
        of_needle = self._interval(mass[..., NEEDLE], chosen)

        def null_of(segment: int) -> list[Any]:
            values = nulls[..., segment]
            return self._mean(np.broadcast_to(values[..., None], shape) if by_head else values, chosen)

        other_masses = []
        for segment in range(len(SEGMENTS)):
            if segment != NEEDLE:
                other_masses += [self._mean(mass[..., segment], chosen), null_of(segment)]
        return [*of_needle, null_of(NEEDLE)], other_masses

    def _retrieval_null(self, chosen: np.ndarray) -> list[Any]:
        """Return the null of retrieval [layer], mean over the chosen prompts."""
        return self._mean(self.per_text.stack("retrieval_null"), chosen)

    def _head_rows(self, chosen: np.ndarray) -> Iterator[TableRow]:
        needle, other_masses = self._masses(chosen, by_head=True)
        retrieval = self.per_text.stack("retrieval")
        columns = [*needle, *other_masses, *self._interval(retrieval, chosen)]
        null, ties = self._retrieval_null(chosen), self._mean(self.per_text.stack("ties"), chosen)
        n_copied = (retrieval == retrieval)[chosen].sum(0)
        for layer in range(self.model.n_layers):
            for head in range(self.model.n_heads_in(layer)):
                yield (
                    layer, head, *(column[layer][head] for column in columns), null[layer], ties[layer][head],
                    int(chosen.sum()), int(n_copied[layer, head]),
                )  # fmt: skip

    def _layer_rows(self, chosen: np.ndarray, best: Sequence[int | None]) -> Iterator[TableRow]:
        needle, other_masses = self._masses(chosen, by_head=False)
        scores, null = self._interval(self.per_text.stack("retrieval"), chosen), self._retrieval_null(chosen)
        for layer in range(self.model.n_layers):
            head = best[layer]
            retrieval = [None if head is None else bound[layer][head] for bound in scores]
            cells = (column[layer] for column in [*needle, *other_masses])
            yield layer, *cells, *retrieval, head, null[layer], int(chosen.sum())

    def _cell_rows(self, best: Sequence[int | None]) -> Iterator[TableRow]:
        for length in self._lengths:
            for depth in dict.fromkeys(prompt.case.depth for prompt in self.measured):
                chosen = self._selection(length, depth)
                if chosen.any():
                    yield from ((length, depth, *row) for row in self._layer_rows(chosen, best))

    def _length_rows(self) -> Iterator[TableRow]:
        for length in self._lengths:
            chosen = self._selection(length)
            n_others = 2 * (len(SEGMENTS) - 1)
            for layer, head, *cells in self._head_rows(chosen):
                needle, retrieval = cells[:4], cells[4 + n_others : 8 + n_others]
                yield layer, head, length, *needle, *retrieval, *cells[-2:]

    def _summary_row(self, layers: Table) -> TableRow:
        import numpy as np

        scores = mean_over_texts(self.per_text.stack("retrieval"))
        has_score = ~np.isnan(scores)
        records = layers.records()
        needle = max(
            (
                (record["needle"], -index)
                for index, record in enumerate(records)
                if record["needle"] is not None
            ),
            default=(None, 0),
        )
        best: tuple[Any, ...] = (None, None, None, None)
        if has_score.any():
            layer, head = np.unravel_index(np.nanargmax(scores), scores.shape)
            best = scores[layer, head], layer, head, records[int(layer)]["retrieval_null"]
        share = float((scores[has_score] >= self.params.threshold).mean()) if has_score.any() else None
        return *best, share, needle[0], None if needle[0] is None else -needle[1], len(self.measured)

    def _explain(self) -> None:
        """Warn of each reason for which numbers are missing."""
        import numpy as np

        is_nan = np.isnan(self.per_text.stack("mass")).any(3)
        is_missing = (is_nan & common.head_exists(self, is_nan.shape[1:])).any((0, 2))
        if is_missing.any():
            layers = ", ".join(map(str, np.flatnonzero(is_missing)))
            self.warn(f"attention of some prompts is missing: it is NaN in layer {layers}")
        copied = np.array([prompt.is_copied for prompt in self.measured])
        unseen = np.isnan(self.per_text.stack("retrieval_null"))[copied]
        for layer in np.flatnonzero(unseen.any(0)) if copied.any() else ():
            self.warn(
                f"retrieval is missing in layer {layer} for {int(unseen[:, layer].sum())} prompts: the key is outside "
                "of the window"
            )
        if len(self.measured) < 2:
            self.warn("fewer than 2 prompts: intervals are missing", TOO_FEW_TEXTS)

    @classmethod
    def plot(cls, tables: Mapping[str, Table], figure: Figure) -> None:
        """Draw retrieval and attention on the needle by depth and length, one column per model."""
        draw_cells(tables, figure)


def _best_heads(scores: np.ndarray) -> list[int | None]:
    """Return the head with the largest score in each layer, of scores [layer, head]; None where all are missing."""
    import numpy as np

    return [None if np.isnan(row).all() else int(np.nanargmax(row)) for row in scores]


@hookimpl
def phaselens_metrics() -> list[type[Metric[Any]] | str]:
    """Return the metrics in this file."""
    return [Segments]
