"""Shared parts of the ablations: controls at another position, parsing of layers, and the table `reach`.

Position 0 matters in two ways: its own residual predicts the first token, and all later positions attend to it. Only
the second is a dependence on a sink, so `reach` separates the two.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from phaselens.plugin import (
    BASELINE,
    Batch,
    CausalMetric,
    Column,
    Condition,
    ConditionKey,
    Edit,
    InputError,
    Metric,
    ModelInfo,
    Params,
    Site,
    Table,
    TableSpec,
    TextOutcome,
    interval_help,
    param,
)
from phaselens_plugins._common import TableRow

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

P = TypeVar("P", bound=Params)
Outer = TypeVar("Outer")
Inner = TypeVar("Inner")
Value = TypeVar("Value")

DEFAULT_SEEDS = 3
"""Default number of positions drawn for a condition's control, one per seed."""


def control_seeds(control: str = "the control") -> Any:
    """Return the parameter for the number of positions drawn for a control."""
    help_text = f"positions drawn for {control}, one after the other; 0: no control"
    return param(DEFAULT_SEEDS, help=help_text, unit="positions", minimum=0)


def paired_interval_columns(unit: str, prefix: str) -> tuple[Column, Column]:
    """Return the columns `…_low` and `…_high` of a paired interval over texts."""
    help_text = interval_help(paired=True)
    return Column(f"{prefix}_low", float, unit, help_text), Column(f"{prefix}_high", float, unit, help_text)


REACH = TableSpec(
    "reach",
    (
        Column("condition", str, None, "the condition's name"),
        Column("layer", int, "index", "the condition's layer, 0-based"),
        Column("head", int, "index", "the condition's head, 0-based; missing where it edits no single head"),
        Column(
            "delta_first",
            float,
            "nats/token",
            "change of the loss of the first predicted token, mean over texts",
        ),
        *paired_interval_columns("nats/token", "first"),
        Column(
            "delta_later",
            float,
            "nats/token",
            "change of the loss of all later tokens, mean over these tokens",
        ),
        *paired_interval_columns("nats/token", "later"),
        Column("n_texts", int, "texts", "texts with later tokens"),
    ),
    "position 0 itself predicts the first token; later predictions see position 0 by attention only",
)


def content_keys(batch: Batch) -> Sequence[str]:
    """Return a hash of each text's content, which identifies the text."""
    return batch.hashes or batch.texts


def draw_other_position(length: int, content: str, seed: int) -> int | None:
    """Return a random position other than 0 from which a token is predicted; None in a text without one.

    The draw depends on the text's content and on the seed alone. The last token predicts nothing, so an edit there
    cannot change the loss: it is drawn only where there is no other position.

    >>> draw_other_position(2, "a", 0), draw_other_position(1, "a", 0)
    (1, None)
    >>> draw_other_position(9, "a", 0) == draw_other_position(9, "a", 0)
    True
    """
    if length < 2:
        return None
    number = int.from_bytes(hashlib.sha256(f"{seed} {content}".encode()).digest()[:8])
    return 1 + number % max(1, length - 2)


@dataclass(frozen=True)
class ZeroOtherPosition:
    """Edit function of the control of an edit of position 0: writes 0 at one position per text, drawn at random."""

    seed: int

    def __call__(self, tensor: Tensor, site: Site) -> Tensor:
        """Return a copy of tensor [batch, pos, …] with one row of each text set to 0."""
        import torch

        if site.batch is None:
            raise LookupError(
                f"{site.point}: the position depends on the text's content; run this condition on texts"
            )
        drawn = [
            draw_other_position(length, content, self.seed)
            for length, content in zip(site.batch.lengths, content_keys(site.batch), strict=True)
        ]
        targets = torch.tensor(
            [-1 if position is None else position for position in drawn], device=tensor.device
        )
        mask = site.positions.to(tensor.device) == targets[:, None]
        return tensor.masked_fill(mask.view(*mask.shape, *(1 for _ in tensor.shape[2:])), 0.0)


def zero_bos_conditions(
    name: str, points: Sequence[str], layer: int | None, seeds: int, params: Mapping[str, object]
) -> Iterator[Condition]:
    """Yield the condition that sets position 0 to 0 at these points, and one control at another position per seed."""
    yield Condition(name, [Edit(point, 0.0, positions=[0]) for point in points], layer, params=params)
    for seed in range(seeds):
        yield Condition(
            f"other position: {name}",
            [Edit(point, ZeroOtherPosition(seed)) for point in points],
            layer,
            seed=seed,
            control_for=name,
            params=params,
        )


class Ablation(CausalMetric[P]):
    """A causal metric with the table `reach`: losses of the first predicted token, and of all later ones."""

    def setup(self) -> None:
        """Start with no losses."""
        super().setup()
        #: Loss of the first predicted token and sum over the later ones, in nats, by condition and text index.
        self.split_losses: dict[ConditionKey, dict[int, tuple[float, float]]] = {}

    def record(self, condition: Condition, outcome: TextOutcome) -> None:
        """Record the loss, and that of the first predicted token separately."""
        super().record(condition, outcome)
        if len(outcome.loss):
            losses = float(outcome.loss[0]), float(outcome.loss[1:].sum(dtype="float64"))
            self.split_losses.setdefault(condition.key, {})[outcome.index] = losses

    def merge(self, other: Metric[P]) -> None:
        """Merge another instance, with its losses split at the first token."""
        super().merge(other)
        if isinstance(other, Ablation):
            merge_nested(self.split_losses, other.split_losses)

    def compute(self) -> Mapping[str, Table]:
        """Return the tables of every causal metric, and `reach`."""
        return {**super().compute(), "reach": self.table("reach", self._reach_rows())}

    def _reach_rows(self) -> Iterator[TableRow]:
        import numpy as np

        from phaselens.uncertainty import compare_conditions, paired_interval

        with_loss = self.split_losses.get(BASELINE.key, {})
        indices = [index for index in self.losses.by_content if index in with_loss]
        n_later = self.losses.n_predicted(indices) - 1
        first_unedited, later_unedited = self._mean_losses([BASELINE], indices, n_later)
        if not indices:
            return
        for group, repeats in self.losses.repeats.items():
            if any(self.losses.no_effect_reason(repeat) for repeat in repeats):
                continue
            first_edited, later_edited = self._mean_losses(repeats, indices, n_later)
            first_interval = paired_interval(
                first_edited,
                first_unedited,
                present=np.isfinite(first_edited) & np.isfinite(first_unedited),
                seed=self.seed,
            )
            later = compare_conditions(later_unedited, later_edited[:, None], n_later, seed=self.seed)[0]
            for field, reason in later.reasons.items():
                if field in ("delta_nats", "delta_low"):
                    self.warn(f"{repeats[0].label}: {field} of later tokens is missing: {reason}")
            yield (
                *group, *(number.tolist() for number in first_interval), later.delta_nats, later.delta_low,
                later.delta_high, int((n_later > 0).sum()),
            )  # fmt: skip

    def _mean_losses(
        self, repeats: Sequence[Condition], indices: Sequence[int], n_later: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return losses [text] of the first predicted token, and mean losses [text] of later ones (0 without any)."""
        import numpy as np

        losses = np.array([[self.split_losses[repeat.key][index] for index in indices] for repeat in repeats])
        # The mean is taken around the first repeat: equal repeats then give their value without rounding.
        mean = (losses[0] + (losses - losses[0]).mean(0)).reshape(len(indices), 2)
        return mean[:, 0], mean[:, 1] / np.maximum(n_later, 1)


def layer_ranges(text: str) -> list[tuple[int, int]] | None:
    """Return the first and last layer of each range that a text names; None for `all`.

    Raises:
        InputError: for a part that is neither a layer nor a range.

    >>> layer_ranges("0,2-4"), layer_ranges("all")
    ([(0, 0), (2, 4)], None)
    """
    if text.strip() == "all":
        return None
    ranges = []
    for entry in text.split(","):
        start, dash, end = (number.strip() for number in entry.partition("-"))
        if not start.isdecimal() or (dash and not end.isdecimal()) or (dash and int(end) < int(start)):
            raise InputError(f"layers: {entry.strip()!r} is neither a layer nor a range; write all, or 0,2-4")
        ranges.append((int(start), int(end if dash else start)))
    return ranges


def parse_layers(text: str, model: ModelInfo) -> list[int]:
    """Return the layers of the model that a text names, ascending; raise InputError for one that it does not have."""
    ranges = layer_ranges(text)
    if ranges is None:
        return list(range(model.n_layers))
    for _, end in ranges:
        require_layer(end, model)
    return sorted({layer for start, end in ranges for layer in range(start, end + 1)})


def require_layer(layer: int | None, model: ModelInfo) -> None:
    """Raise InputError for a layer that the model does not have."""
    if layer is not None and layer >= model.n_layers:
        raise InputError(f"layer is {layer}, but {model.label} has layers 0 to {model.n_layers - 1}")


def merge_nested(
    target: dict[Outer, dict[Inner, Value]], source: Mapping[Outer, Mapping[Inner, Value]]
) -> None:
    """Add the inner entries of `source` to those of `target`."""
    for key, entries in source.items():
        target.setdefault(key, {}).update(entries)
