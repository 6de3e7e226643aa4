"""The tables of a causal metric, made from its losses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from phaselens.errors import InputError, require_function, require_kind, require_whole
from phaselens.plugin.conditions import BASELINE, Condition
from phaselens.plugin.losses import Losses
from phaselens.plugin.tables import Column, TableSpec, interval_help

if TYPE_CHECKING:
    import numpy as np

_INTERVAL = interval_help(paired=True)
_D_Z = "over the sd (n − 1) of the texts' differences, both weighted by predicted tokens"

CAUSAL_TABLES = (
    TableSpec(
        "texts",
        (
            Column("text", str, None, "the text's id"),
            Column("condition", str, None, "the condition's name; `baseline` is the model as it is"),
            Column("layer", int, "index", "the layer it concerns, 0-based"),
            Column("loss", float, "nats/token", "mean over the text's predicted tokens"),
            Column("n_predicted", int, "tokens", "predicted tokens: the text's tokens but the first"),
            Column("seed", int, None, "which repeat of a control"),
        ),
        "a row per text and condition",
    ),
    TableSpec(
        "conditions",
        (
            Column("condition", str, None, "the condition's name; `baseline` is the model as it is"),
            Column("layer", int, "index", "the layer it concerns, 0-based"),
            Column("ppl", float, "perplexity", "exp of the mean loss over all predicted tokens"),
            Column("ratio", float, "ratio", "ppl over the baseline's; 1 if the condition does nothing"),
            Column("ci_low", float, "ratio", _INTERVAL),
            Column("ci_high", float, "ratio", _INTERVAL),
            Column(
                "delta_nats",
                float,
                "nats/token",
                "ln of the ratio: what the condition adds to the loss, mean over all predicted tokens",
            ),
            Column(
                "p_value",
                float,
                "probability",
                "of such a delta_nats by chance: signs of the texts' differences swapped",
            ),
            Column("n_texts", int, "texts", "texts with a predicted token"),
            Column("delta_low", float, "nats/token", _INTERVAL),
            Column("delta_high", float, "nats/token", _INTERVAL),
            Column("d_z", float, "sd", f"delta_nats {_D_Z}"),
            Column("worse", float, "fraction", "texts whose loss rose; 0.5 by chance"),
            Column("n_predicted", int, "tokens", "predicted tokens of all texts"),
            Column("n_seeds", int, "seeds", "repeats that were averaged, text by text, before all else"),
            Column(
                "ppl_length_weighted",
                float,
                "perplexity",
                "texts weighted by their tokens, the first one included",
            ),
            Column("ratio_length_weighted", float, "ratio", "the same of the ratio"),
        ),
        "a row per condition, the baseline first",
    ),
    TableSpec(
        "contrasts",
        (
            Column("condition", str, None, "the condition"),
            Column("control", str, None, "what it is compared with"),
            Column("layer", int, "index", "the layer they concern, 0-based"),
            Column("delta_nats", float, "nats/token", "condition − control, mean over all predicted tokens"),
            Column("ci_low", float, "nats/token", _INTERVAL),
            Column("ci_high", float, "nats/token", _INTERVAL),
            Column(
                "p_value",
                float,
                "probability",
                "of such a delta_nats by chance: signs of the texts' differences swapped",
            ),
            Column("d_z", float, "sd", f"delta_nats {_D_Z}"),
            Column("n_texts", int, "texts", "texts in both"),
            Column("n_seeds", int, "seeds", "repeats of the control, averaged text by text first"),
        ),
        "a row per condition and control of it",
    ),
)


#: What of a comparison stands in a table, and so needs its reason where it is missing.
_FIELDS = frozenset(
    {
        "ppl",
        "ratio",
        "ci_low",
        "ci_high",
        "delta_nats",
        "difference",
        "delta_low",
        "delta_high",
        "p_value",
        "d_z",
    }
    | {"share_worse", "ppl_length_weighted", "ratio_length_weighted"}
)


class CausalTables:
    """Rows of the three tables; what is missing in them gets its reason through `warn`.

    Raises:
        InputError: where no condition did anything.
    """

    def __init__(self, losses: Losses, seed: int, warn: Callable[[str], None]) -> None:
        require_kind("losses", losses, Losses, "as a causal metric keeps them")
        require_whole("seed", seed, 0)
        require_function("warn", warn)
        self._losses = losses
        self._seed = seed
        self._warn = warn
        self._complain()
        self._sound = {condition.key for condition in losses.working}

    def _complain(self) -> None:
        """Say which conditions did nothing, and why."""
        asked = list(self._losses.conditions.values())
        refused = {condition.key: self._losses.refusal(condition) for condition in asked}
        for condition in asked:
            reason = refused[condition.key]
            if reason:
                self._warn(f"{_called(condition)} is null: {reason}")
            for point in self._losses.idle(condition):
                self._warn(
                    f"{_called(condition)}: what it writes at {point} stood there already, in every text"
                )
        if asked and all(refused.values()):
            reasons = "; ".join(dict.fromkeys(f"{_called(one)}: {refused[one.key]}" for one in asked))
            raise InputError(f"no condition did anything: {reasons}")

    def texts(self) -> Iterator[tuple[Any, ...]]:
        """A row per text and condition."""
        indices = self._losses.indices
        n_predicted = self._losses.n_predicted(indices)
        sound = self._sound | {BASELINE.key}
        for condition in (BASELINE, *self._losses.conditions.values()):
            losses = self._losses.of(condition, indices)
            for index, loss, n in zip(indices, losses, n_predicted, strict=True):
                if not n:
                    self._warn(
                        f"text {self._losses.names[index]!r}: one token, so nothing is predicted: loss is null"
                    )
                there = condition.key in sound and loss == loss
                yield (
                    self._losses.names[index],
                    condition.name,
                    condition.layer,
                    loss if there else None,
                    n,
                    condition.seed,
                )

    def conditions(self) -> Iterator[tuple[Any, ...]]:
        """A row per condition, the baseline first."""
        from phaselens.uncertainty import compare_conditions

        indices = [index for index in self._losses.by_content if self._losses.predicts(index)]
        n_predicted = self._losses.n_predicted(indices)
        lengths = [self._losses.lengths[index] for index in indices]
        before = self._losses.of(BASELINE, indices)
        groups = list(_repeats(self._losses.conditions.values()).items())
        columns = [self._mean_over_seeds(group, indices) for _, group in groups]
        compared = compare_conditions(
            before, _side_by_side([before, *columns]), n_predicted, lengths=lengths, seed=self._seed
        )
        first = compared[0]
        if first.ppl_baseline is None:
            self._warn(f"baseline: ppl is null: {first.reasons['ppl_baseline']}")
        yield (
            BASELINE.name, None, first.ppl_baseline, *([None] * 5), first.n_texts, *([None] * 4), first.n_predicted,
            1, first.ppl_baseline_length_weighted, None,
        )  # fmt: skip
        for ((name, layer), group), found in zip(groups, compared[1:], strict=True):
            if not all(condition.key in self._sound for condition in group):
                yield (
                    name,
                    layer,
                    *([None] * 6),
                    found.n_texts,
                    *([None] * 4),
                    found.n_predicted,
                    len(group),
                    None,
                    None,
                )
                continue
            self._explain(_called(group[0]), found.reasons)
            yield (
                name, layer, found.ppl, found.ratio, found.ci_low, found.ci_high, found.delta_nats, found.p_value,
                found.n_texts, found.delta_low, found.delta_high, found.d_z, found.share_worse, found.n_predicted,
                len(group), found.ppl_length_weighted, found.ratio_length_weighted,
            )  # fmt: skip

    def contrasts(self) -> Iterator[tuple[Any, ...]]:
        """A row per condition and control of it."""
        from phaselens.uncertainty import compare_arms

        indices = [index for index in self._losses.by_content if self._losses.predicts(index)]
        n_predicted = self._losses.n_predicted(indices)
        groups = _repeats(self._losses.conditions.values())
        for (name, layer), controls in groups.items():
            of = controls[0].control_for
            treated = groups.get((of, layer)) if of is not None else None
            if treated is None or not all(one.key in self._sound for one in (*treated, *controls)):
                continue
            repeats = _side_by_side([self._losses.of(control, indices) for control in controls])
            found = compare_arms(
                self._mean_over_seeds(treated, indices), repeats, n_predicted=n_predicted, seed=self._seed
            )
            self._explain(f"{of} − {name}", found.reasons)
            yield (
                of, name, layer, found.difference, found.ci_low, found.ci_high, found.p_value, found.d_z,
                found.n_texts, found.n_seeds,
            )  # fmt: skip

    def _mean_over_seeds(self, group: Sequence[Condition], indices: Sequence[int]) -> np.ndarray:
        """Loss [text] of one condition, its repeats averaged text by text."""
        import numpy as np

        repeats = np.stack([self._losses.of(condition, indices) for condition in group])
        # Around the first: repeats that agree give their value and no rounding.
        mean: np.ndarray = repeats[0] + (repeats - repeats[0]).mean(0)
        return mean

    def _explain(self, what: str, reasons: Mapping[str, str]) -> None:
        shown = {name: reason for name, reason in reasons.items() if name in _FIELDS}
        for reason in dict.fromkeys(shown.values()):
            fields = [name for name, given in shown.items() if given == reason]
            self._warn(f"{what}: {', '.join(fields)} null: {reason}")


def _called(condition: Condition) -> str:
    """A condition's name for messages."""
    return condition.name if condition.layer is None else f"{condition.name} (layer {condition.layer})"


def _side_by_side(columns: Sequence[np.ndarray]) -> np.ndarray:
    """[text, column]."""
    import numpy as np

    return np.stack(columns, axis=1)


def _repeats(conditions: Iterable[Condition]) -> dict[tuple[str, int | None], list[Condition]]:
    """Conditions by name and layer; several in one place are repeats with different seeds."""
    groups: dict[tuple[str, int | None], list[Condition]] = {}
    for condition in conditions:
        groups.setdefault((condition.name, condition.layer), []).append(condition)
    return groups
