"""From RoPE to NoPE in steps: the rotation of a share of the frequencies nulled, the lowest or the highest first.

p-RoPE (Barbero et al. 2024, arXiv:2410.06205, section 6) keeps the rotation of a share p of the pairs. Here the others
are nulled in a trained model: their cos and sin are those of position 0, at every position. p = 1 is the unedited
model, p = 0 the model of `positions="nope"`, equal to the bit. Loss, sinks and the retrieval of a passkey are functions
of p.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phaselens.plugin import (
    BASELINE,
    CausalMetric,
    Condition,
    ConditionKey,
    Edit,
    InputError,
    LayerView,
    Metric,
    Params,
    Table,
    TaskPrompt,
    TextOutcome,
    hookimpl,
    in_layer,
    param,
)
from phaselens_plugins._causal import merge_nested
from phaselens_plugins._common import TableRow, head_exists, mean_over_heads
from phaselens_plugins._number_lists import parse_numbers
from phaselens_plugins._p_rope_tables import ENDS, TABLES, draw_steps
from phaselens_plugins._passkeys import parse_depths, parse_lengths
from phaselens_plugins.passkey import Passkey

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

SINK, COS, SIN = "attn.hook_sink", "attn.hook_cos", "attn.hook_sin"


@dataclass(frozen=True)
class PRopeParams(Params):
    """Parameters of the metric."""

    p: str = param(
        "1, 0.75, 0.5, 0.25, 0", help="shares of the pairs whose rotation is kept, separated by commas"
    )
    ends: str = param(
        "both",
        help="null the lowest frequencies first, the highest, or each in turn",
        choices=("low", "high", "both"),
    )
    threshold: float = param(
        0.3,
        help="a head is a sink if its score is at least this",
        unit="share of attention",
        minimum=0,
        maximum=1,
    )
    passkey_lengths: str = param(
        "n_ctx/2, n_ctx",
        help="tokens of the passkey prompts, as in passkey; empty: no passkeys",
        unit="tokens",
    )
    passkey_depths: str = param("0, 0.5, 1", help="shares of the filler that precede the passkey")
    passkey_n: int = param(4, help="prompts for each length and depth", unit="prompts", minimum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_shares(self.p)
        parse_depths(self.passkey_depths)
        if self.passkey_lengths.strip():
            parse_lengths(self.passkey_lengths, 1 << 20)

    @property
    def end_names(self) -> list[str]:
        """The ends whose frequencies are nulled first: `lowest`, `highest`."""
        return [name for end, name in ENDS.items() if self.ends in (end, "both")]


def parse_shares(text: str) -> list[float]:
    """Return the shares that a text names, each once, from the largest; raise InputError for others than 0 to 1.

    >>> parse_shares("0, 1, .5")
    [1.0, 0.5, 0.0]
    """
    shares = parse_numbers(
        text.split(","),
        lambda share: 0 <= share <= 1,
        "p has {entry!r}; give shares from 0 to 1, separated by commas",
    )
    return sorted(shares, reverse=True)


class PRope(CausalMetric[PRopeParams]):
    """Metric of loss, sinks and passkeys with the rotation of a share of the frequencies nulled."""

    name = "p-rope"
    version = "1"
    title = "rotation of a share of the frequencies nulled"
    description = (
        "loss, sinks and passkeys from RoPE to NoPE, by the share of rotary frequencies that is kept"
    )
    citation = "Barbero et al. 2024, arXiv:2410.06205"
    Params = PRopeParams
    also_on_texts = True
    plots = True
    tables = TABLES

    @classmethod
    def define(cls, params: PRopeParams) -> str:
        """State which rotations are nulled."""
        ends = " or ".join(params.end_names)
        return (
            f"cos and sin of the {ends} share 1 − p of the rotated pairs := those of position 0, in all rotated "
            f"layers; p in {params.p}; sink: score on position 0 ≥ {params.threshold:g}"
        )

    def setup(self) -> None:
        """Refuse a rotation that cannot be nulled in part, and positions of another kind; start without values.

        A model without positions is at p = 0 as it is.
        """
        super().setup()
        self.rotated_layers = [
            layer for layer, encoding in enumerate(self.model.positions) if "rope" in encoding
        ]
        if not self.rotated_layers and set(self.model.positions) != {"nope"}:
            raise InputError(
                f"{self.model.label} has no rotated layer (positions: {self.model.positions_summary}); p-rope needs a "
                "rotary model, or one without positions"
            )
        for layer in self.rotated_layers:
            rotation = self.model.rotations[layer] if layer < len(self.model.rotations) else None
            if rotation is None or rotation.factor is None or len(rotation.entries) != len(rotation.pairs):
                problem = (rotation and rotation.problem) or "its angles are not entries of cos and sin"
                raise InputError(
                    f"{self.model.label}: the rotation of layer {layer} cannot be nulled in part: {problem}"
                )
        #: Score [layer, head] of each text, by condition and the text's index.
        self.sink_scores: dict[ConditionKey, dict[int, dict[int, np.ndarray]]] = {}
        self.text_lengths: dict[int, int] = {}
        self.task: Passkey | None = None
        if self.params.passkey_lengths.strip():
            values = {
                "lengths": self.params.passkey_lengths,
                "depths": self.params.passkey_depths,
                "n": self.params.passkey_n,
                "null": "none",
            }
            self.task = Passkey(self.model, Passkey.Params.parse(values), self.seed)

    def hooks(self) -> Sequence[str]:
        """Return the point of the unedited model's sink mass."""
        return [in_layer("{layer}", SINK)]

    def condition_hooks(self) -> Sequence[str]:
        """Return the point of the sink mass under each condition."""
        return self.hooks()

    def update(self, layer: LayerView) -> None:
        """Keep the unedited model's sink scores."""
        self._keep_scores(BASELINE, layer)

    def update_condition(self, condition: Condition, layer: LayerView) -> None:
        """Keep the sink scores under a condition, of the run's texts alone."""
        if self.task is None or layer.batch.texts[0] not in self.task.made_prompts:
            self._keep_scores(condition, layer)

    def _keep_scores(self, condition: Condition, layer: LayerView) -> None:
        from phaselens.attention import sink_score

        sink = layer.float64(SINK)
        lengths = layer.batch.lengths_on(sink.device)
        scores = sink_score(sink, lengths, window=self.model.windows[layer.index or 0]).cpu().numpy()
        by_text = self.sink_scores.setdefault(condition.key, {})
        for row, index in enumerate(layer.batch.indices):
            self.text_lengths[index] = layer.batch.lengths[row]
            by_text.setdefault(index, {})[layer.index or 0] = scores[row]

    def merge(self, other: Metric[PRopeParams]) -> None:
        """Merge another instance, with its sinks and passkeys."""
        super().merge(other)
        if isinstance(other, PRope):
            merge_nested(self.sink_scores, other.sink_scores)
            self.text_lengths |= other.text_lengths
            if self.task is not None and other.task is not None:
                self.task.merge(other.task)

    def prompts(self, tokenizer: object) -> Sequence[TaskPrompt]:
        """Return the passkey prompts; none, with a warning, where this tokenizer or model allows none."""
        if self.task is None:
            return []
        self.task.bos = self.bos
        try:
            prompts = self.task.prompts(tokenizer)
        except InputError as error:
            self.warn(f"passkeys are missing: {error}")
            return []
        for warning in self.task.warnings:
            self.warn(f"passkeys: {warning}")
        return prompts

    def conditions(self) -> Sequence[Condition]:
        """Return a condition for each share and end; p = 1 is the baseline."""
        if not self.rotated_layers:
            self.warn("no rotation is nulled: no layer is rotated, so the unedited model is the one of p = 0")
            return []
        conditions = []
        for share in parse_shares(self.params.p):
            if share == 1:
                continue
            ends = self.params.end_names if share else self.params.end_names[:1]
            for end in ends:
                edits = [edit for layer in self.rotated_layers for edit in self._edits(layer, share, end)]
                if not edits:
                    self.warn(f"p = {share:g} nulls no pair: there are too few")
                    continue
                is_second = end != ends[0]
                conditions.append(
                    Condition(
                        condition_name(share, end),
                        edits,
                        control_for=condition_name(share, ends[0]) if is_second else None,
                        params={"p": share, "end": end},
                    )
                )
        return conditions

    def nulled_pairs(self, layer: int, share: float, end: str) -> list[int]:
        """Return the pairs of a layer whose rotation is nulled, by frequency from that end."""
        rotation = self.model.rotations[layer]
        assert rotation is not None
        ascending = sorted(range(len(rotation.pairs)), key=lambda pair: (rotation.angles[pair], -pair))
        ordered = ascending if end == ENDS["low"] else ascending[::-1]
        return ordered[: round((1 - share) * len(ordered))]

    def _edits(self, layer: int, share: float, end: str) -> Iterator[Edit]:
        """Yield the edits of cos and sin in one layer."""
        rotation = self.model.rotations[layer]
        assert rotation is not None
        assert rotation.factor is not None
        pairs = self.nulled_pairs(layer, share, end)
        entries = sorted({entry for pair in pairs for entry in rotation.entries[pair]})
        if entries:
            yield Edit(in_layer(layer, COS), rotation.factor, entries=entries)
            yield Edit(in_layer(layer, SIN), 0.0, entries=entries)

    def record(self, condition: Condition, outcome: TextOutcome) -> None:
        """Record the loss of a text, or the score of a passkey prompt."""
        if self.task is not None and outcome.text in self.task.made_prompts:
            self.task.record(condition, outcome)
        else:
            super().record(condition, outcome)

    def compute(self) -> Mapping[str, Table]:
        """Return the tables of every causal metric, and those by p."""
        tables = dict(super().compute())
        rows = {record["condition"]: record for record in tables["conditions"].records()}
        return {
            **tables,
            "curve": self.table("curve", self._curve_rows(rows)),
            "sinks": self.table("sinks", self._sink_rows()),
            "passkeys": self.table("passkeys", self._passkey_rows()),
        }

    def _curve_rows(self, rows: Mapping[Any, Mapping[str, Any]]) -> Iterator[TableRow]:
        conditions = {condition.name: condition for condition in self.losses.conditions.values()}
        columns = ("ppl", "ratio", "ci_low", "ci_high", "delta_nats", "delta_low", "delta_high")
        unedited = rows[BASELINE.name]
        n_texts = unedited["n_texts"]
        exactly_one = (unedited["ppl"], *((1.0, 1.0, 1.0, 0.0, 0.0, 0.0) if n_texts else (None,) * 6))
        for end, share in self._steps():
            is_unedited = share == 1 or not self.rotated_layers
            name = condition_name(share, end)
            condition = BASELINE if is_unedited else conditions.get(name)
            if condition is None:
                continue
            loss = exactly_one if is_unedited else [rows[name][column] for column in columns]
            counts = [len(self.nulled_pairs(layer, share, end)) for layer in self.rotated_layers]
            yield (
                end, share, max(counts, default=0), *loss, *self._sinks(condition), *self._passkey(condition), n_texts
            )  # fmt: skip

    def _steps(self) -> Sequence[tuple[str, float]]:
        """Return each end and share; of a model without rotation, p = 0 alone."""
        if not self.rotated_layers:
            return [(self.params.end_names[0], 0.0)]
        return [(end, share) for end in self.params.end_names for share in parse_shares(self.params.p)]

    def _scores(self, condition: Condition) -> np.ndarray:
        """Return the scores [text, layer, head] of the texts in the order of their content; NaN where missing."""
        import numpy as np

        by_text = self.sink_scores.get(condition.key, {})
        indices = [index for index in self.losses.by_content if index in by_text]
        shape = (len(indices), self.model.n_layers, self.model.n_heads)
        scores = np.full(shape, np.nan)
        for row, index in enumerate(indices):
            for layer, values in by_text[index].items():
                scores[row, layer, : len(values)] = values
        return scores

    def _sinks(self, condition: Condition) -> TableRow:
        """Return sink rate with its interval and null, and the mean score, over texts, layers and heads."""
        import numpy as np

        from phaselens.attention import uniform_sink
        from phaselens.uncertainty import mean_interval

        scores = self._scores(condition)
        exists = head_exists(self, scores.shape[1:])
        complete = self._complete(scores)
        texts = np.asarray(complete.any(1))
        if not texts.any():
            return (None, None, None, None, None)
        is_sink = np.where(complete, mean_over_heads(self, scores >= self.params.threshold), 0.0)
        rates = is_sink[texts].sum(1) / complete[texts].sum(1)
        rate, low, high = (bound.tolist() for bound in mean_interval(rates, seed=self.seed))
        lengths = [self.text_lengths[index] for index in self.losses.by_content if index in self.text_lengths]
        nulls = [[uniform_sink(length, window=window) for window in self.model.windows] for length in lengths]
        uniform = [
            sum(value >= self.params.threshold for value in row if value is not None) / len(row)
            for row in nulls
        ]
        null = float(np.mean(np.array(uniform)[texts])) if len(uniform) == len(texts) else None
        return rate, low, high, null, float(scores[complete[..., None] & exists].mean())

    def _complete(self, scores: np.ndarray) -> np.ndarray:
        """Return whether all heads of a layer have a score, bool [text, layer]."""
        import numpy as np

        complete: np.ndarray = ~(np.isnan(scores) & head_exists(self, scores.shape[1:])).any(2)
        return complete

    def _sink_rows(self) -> Iterator[TableRow]:
        import numpy as np

        from phaselens.uncertainty import mean_interval

        for condition in (BASELINE, *self.losses.conditions.values()):
            scores = self._scores(condition)
            complete = self._complete(scores)
            rates = np.where(complete, mean_over_heads(self, scores >= self.params.threshold), 0.0)
            bounds = [bound.tolist() for bound in mean_interval(rates, present=complete, seed=self.seed)]
            for layer in range(self.model.n_layers):
                present = complete[:, layer]
                of_heads = scores[present, layer, : self.model.n_heads_in(layer)]
                score = float(of_heads.mean()) if present.any() else None
                interval = [bound[layer] for bound in bounds] if len(scores) else [None] * 3
                yield condition.name, layer, *interval, score

    def _passkey(self, condition: Condition, length: int | None = None) -> TableRow:
        """Return the share of passkeys retrieved with its interval, chance, and the number of prompts."""
        if self.task is None or not self.task.made_prompts:
            return (None, None, None, None, None)
        ids = [case.id for case in self.task.cases(length) if case.id in self.task.made_prompts]
        return (*self.task.share([condition], ids, "exact"), self.task.key_chance, len(ids))

    def _passkey_rows(self) -> Iterator[TableRow]:
        if self.task is None or not self.task.made_prompts:
            return
        for condition in (BASELINE, *self.losses.conditions.values()):
            for length in self.task.lengths:
                row = self._passkey(condition, length)
                if row[-1]:
                    yield condition.name, length, *row

    @classmethod
    def plot(cls, tables: Mapping[str, Table], figure: Figure) -> None:
        """Draw loss, sinks and passkeys against p, from 1 to 0: one line per model and end."""
        draw_steps(tables, figure)


def condition_name(share: float, end: str) -> str:
    """Return the name of a condition; with nothing rotated, the end makes no difference.

    >>> condition_name(0.5, "lowest"), condition_name(0.0, "highest")
    ('p = 0.5, lowest nulled', 'p = 0')
    """
    return f"p = {share:g}, {end} nulled" if share else "p = 0"


@hookimpl
def phaselens_metrics() -> list[type[Metric[Any]] | str]:
    """Return the metrics in this file."""
    return [PRope]
