"""What the ablations share: another position as a control, layers named in text, and where a loss changes.

Position 0 matters in two ways: its own residual predicts the first token, and all later positions attend to it.
Only the second is a dependence on a sink, so the two are told apart in the table `reach`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from phaselens.plugin import (
    BASELINE,
    CausalMetric,
    Column,
    Condition,
    Edit,
    InputError,
    Metric,
    ModelInfo,
    Outcome,
    Params,
    Site,
    Table,
    TableSpec,
    interval_help,
    param,
)

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

P = TypeVar("P", bound=Params)

SEEDS = 3
"""Positions drawn for the control of a condition, one a seed."""


def control_seeds(control: str = "the control") -> Any:
    """The parameter that says how many."""
    what = f"positions drawn for {control}, one after the other; 0: no control"
    return param(SEEDS, help=what, unit="positions", minimum=0)


_INTERVAL = interval_help(paired=True)
REACH = TableSpec(
    "reach",
    (
        Column("condition", str, None, "the condition's name"),
        Column("layer", int, "index", "the layer it concerns, 0-based"),
        Column(
            "delta_first",
            float,
            "nats/token",
            "added to the loss of the first predicted token, mean over texts",
        ),
        Column("first_low", float, "nats/token", _INTERVAL),
        Column("first_high", float, "nats/token", _INTERVAL),
        Column(
            "delta_later", float, "nats/token", "added to the loss of all later tokens, mean over all of them"
        ),
        Column("later_low", float, "nats/token", _INTERVAL),
        Column("later_high", float, "nats/token", _INTERVAL),
        Column("n_texts", int, "texts", "texts with such later tokens"),
    ),
    "the first predicted token is position 0's own; later ones see position 0 by attention only",
)


def elsewhere(length: int, content: str, seed: int) -> int | None:
    """A position other than 0 that a token is predicted from, by chance; None in a text without one.

    The draw depends on what the text says and on the seed alone. The last token predicts nothing: to edit it could
    change no loss, so it is drawn only where there is no other.

    >>> elsewhere(2, "a", 0), elsewhere(1, "a", 0), elsewhere(9, "a", 0) == elsewhere(9, "a", 0)
    (1, None, True)
    """
    if length < 2:
        return None
    drawn = int.from_bytes(hashlib.sha256(f"{seed} {content}".encode()).digest()[:8])
    return 1 + drawn % max(1, length - 2)


@dataclass(frozen=True)
class ZeroElsewhere:
    """The control of an edit of position 0: writes 0 at one position of each text, drawn by `elsewhere`."""

    seed: int

    def __call__(self, tensor: Tensor, site: Site) -> Tensor:
        """tensor [batch, pos, …] → the same with one row of each text 0."""
        import torch

        if site.batch is None:
            raise LookupError(f"{site.point}: another position is drawn by what a text says; run it on texts")
        contents = site.batch.hashes or site.batch.texts
        drawn = [
            elsewhere(length, content, self.seed)
            for length, content in zip(site.batch.lengths, contents, strict=True)
        ]
        chosen = torch.tensor([-1 if one is None else one for one in drawn], device=tensor.device)
        hit = site.positions.to(tensor.device) == chosen[:, None]
        return tensor.masked_fill(hit.view(*hit.shape, *(1 for _ in tensor.shape[2:])), 0.0)


def at_bos(
    name: str, points: Sequence[str], layer: int | None, seeds: int, params: Mapping[str, Any]
) -> Iterator[Condition]:
    """Position 0 := 0 at these points, and for each seed its control, the same at another position."""
    yield Condition(name, [Edit(point, 0.0, positions=[0]) for point in points], layer, params=params)
    for seed in range(seeds):
        yield Condition(
            f"other position: {name}",
            [Edit(point, ZeroElsewhere(seed)) for point in points],
            layer,
            seed=seed,
            control_for=name,
            params=params,
        )


class Ablation(CausalMetric[P]):
    """A causal metric that also keeps what a condition does to the first predicted token and to the later ones."""

    def setup(self) -> None:
        """[first, sum of the later] nats of each text, by condition."""
        super().setup()
        self.split: dict[tuple[str, int | None, int | None], dict[int, tuple[float, float]]] = {}

    def record(self, condition: Condition, outcome: Outcome) -> None:
        """Also keeps the first predicted token's loss by itself."""
        super().record(condition, outcome)
        if len(outcome.loss):
            first, later = float(outcome.loss[0]), float(outcome.loss[1:].sum(dtype="float64"))
            self.split.setdefault(condition.key, {})[outcome.index] = first, later

    def merge(self, other: Metric[P]) -> None:
        """Also the split losses."""
        super().merge(other)
        if isinstance(other, Ablation):
            for key, found in other.split.items():
                self.split.setdefault(key, {}).update(found)

    def compute(self) -> Mapping[str, Table]:
        """Also the table `reach`."""
        return {**super().compute(), "reach": self.table("reach", self._reach())}

    def _reach(self) -> Iterator[tuple[Any, ...]]:
        import numpy as np

        from phaselens.uncertainty import compare_conditions, paired_interval

        indices = [index for index in self.losses.by_content if index in self.split.get(BASELINE.key, {})]
        n_later = self.losses.n_predicted(indices) - 1
        base = self._split_of([BASELINE], indices, n_later)
        groups: dict[tuple[str, int | None], list[Condition]] = {}
        for condition in self.losses.conditions.values():
            groups.setdefault((condition.name, condition.layer), []).append(condition)
        if not indices:
            return
        for (name, layer), repeats in groups.items():
            if any(self.losses.refusal(one) for one in repeats):
                continue
            found = self._split_of(repeats, indices, n_later)
            present = np.isfinite(found[0]) & np.isfinite(base[0])
            first = [
                each.tolist() for each in paired_interval(found[0], base[0], present=present, seed=self.seed)
            ]
            later = compare_conditions(base[1], found[1][:, None], n_later, seed=self.seed)[0]
            for what, why in later.reasons.items():
                if what in ("delta_nats", "delta_low"):
                    self.warn(f"{name}: {what} of later tokens is null: {why}")
            nats = later.delta_nats, later.delta_low, later.delta_high
            yield name, layer, *first, *nats, int((n_later > 0).sum())

    def _split_of(
        self, repeats: Sequence[Condition], indices: Sequence[int], n_later: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Loss [text] of the first predicted token, and mean loss [text] of the later ones (0 where there are none)."""
        import numpy as np

        found = np.array([[self.split[one.key][index] for index in indices] for one in repeats])
        # Around the first one: repeats that agree give their value and no rounding.
        mean = found[0] + (found - found[0]).mean(0)
        mean = mean.reshape(len(indices), 2)
        return mean[:, 0], mean[:, 1] / np.maximum(n_later, 1)


def layer_ranges(asked: str) -> list[tuple[int, int]] | None:
    """First and last layer of each range that a text names; None for `all`.

    Raises:
        InputError: what is wrong with it, in words.

    >>> layer_ranges("0,2-4"), layer_ranges("all")
    ([(0, 0), (2, 4)], None)
    """
    if asked.strip() == "all":
        return None
    ranges = []
    for part in asked.split(","):
        first, dash, last = (each.strip() for each in part.partition("-"))
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise InputError(f"layers: {part.strip()!r} is no layer and no range; write all, or 0,2-4")
        ranges.append((int(first), int(last if dash else first)))
    return ranges


def layers_in(asked: str, model: ModelInfo) -> list[int]:
    """Layers of the model that a text names, ascending; InputError for one that the model does not have."""
    ranges = layer_ranges(asked)
    for _, last in ranges or []:
        require_layer(last, model)
    pairs = [(0, model.n_layers - 1)] if ranges is None else ranges
    return sorted({layer for first, last in pairs for layer in range(first, last + 1)})


def require_layer(layer: int | None, model: ModelInfo) -> None:
    """Raise InputError for a layer that the model does not have."""
    if layer is not None and layer >= model.n_layers:
        raise InputError(f"layer is {layer}, but {model.label} has layers 0 to {model.n_layers - 1}")
