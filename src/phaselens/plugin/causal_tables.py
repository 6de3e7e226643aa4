"""The tables of a causal metric, computed from its losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from phaselens.errors import require_function, require_kind, require_whole
from phaselens.plugin.adjusted_p import ADJUSTED_P, with_adjusted_p
from phaselens.plugin.author_errors import finding_error
from phaselens.plugin.condition_losses import Losses
from phaselens.plugin.conditions import BASELINE, Condition
from phaselens.plugin.tables import Column, TableSpec, interval_help

if TYPE_CHECKING:
    import numpy as np

_INTERVAL = interval_help(paired=True)
_HEAD = Column("head", int, "index", "the condition's head, 0-based; missing where it edits no single head")
_D_Z = "divided by the sd (n − 1) of the texts' differences, both weighted by predicted tokens"

CAUSAL_TABLES = (
    TableSpec(
        "texts",
        (
            Column("text", str, None, "the text's id"),
            Column("condition", str, None, "the condition's name; `baseline` is the unedited model"),
            Column("layer", int, "index", "the condition's layer, 0-based"),
            _HEAD,
            Column("loss", float, "nats/token", "mean over the text's predicted tokens"),
            Column(
                "n_predicted", int, "tokens", "predicted tokens: all of the text's tokens except the first"
            ),
            Column("seed", int, None, "the repeat of a control"),
        ),
        "one row per text and condition",
    ),
    TableSpec(
        "conditions",
        (
            Column("condition", str, None, "the condition's name; `baseline` is the unedited model"),
            Column("layer", int, "index", "the condition's layer, 0-based"),
            _HEAD,
            Column("ppl", float, "perplexity", "exp of the mean loss over all predicted tokens"),
            Column(
                "ratio", float, "ratio", "ppl divided by the baseline's; 1 if the condition has no effect"
            ),
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
                "two-sided p of delta_nats, from random sign flips of texts",
            ),
            Column("n_texts", int, "texts", "texts with a predicted token"),
            Column("delta_low", float, "nats/token", _INTERVAL),
            Column("delta_high", float, "nats/token", _INTERVAL),
            Column("d_z", float, "sd", f"delta_nats {_D_Z}"),
            Column("worse", float, "fraction", "texts whose loss rose; 0.5 by chance"),
            Column("n_predicted", int, "tokens", "predicted tokens of all texts"),
            Column(
                "n_seeds", int, "seeds", "repeats, averaged text by text before anything else is computed"
            ),
            Column(
                "ppl_length_weighted",
                float,
                "perplexity",
                "texts weighted by their tokens, the first one included",
            ),
            Column("ratio_length_weighted", float, "ratio", "ratio with texts weighted by all tokens"),
            *ADJUSTED_P,
        ),
        "one row per condition, the baseline first",
    ),
    TableSpec(
        "contrasts",
        (
            Column("condition", str, None, "the condition's name"),
            Column("control", str, None, "the control that it is compared with"),
            Column("layer", int, "index", "the layer of both, 0-based"),
            Column("head", int, "index", "the head of both, 0-based; missing where they edit no single head"),
            Column("delta_nats", float, "nats/token", "condition − control, mean over all predicted tokens"),
            Column("ci_low", float, "nats/token", _INTERVAL),
            Column("ci_high", float, "nats/token", _INTERVAL),
            Column(
                "p_value",
                float,
                "probability",
                "two-sided p of delta_nats, from random sign flips of texts",
            ),
            Column("d_z", float, "sd", f"delta_nats {_D_Z}"),
            Column("n_texts", int, "texts", "texts in both"),
            Column("n_seeds", int, "seeds", "repeats of the control, averaged text by text first"),
            *ADJUSTED_P,
        ),
        "one row per condition and control",
    ),
)


_P_OF_CONDITION, _P_OF_CONTRAST = (spec.index("p_value") for spec in CAUSAL_TABLES[1:])

#: Fields of a comparison that are columns of a table, and so need a reason if they are missing.
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
        "share_worse",
        "ppl_length_weighted",
        "ratio_length_weighted",
    }
)


class CausalTables:
    """Rows of the three tables. `warn` receives the reason for each missing value.

    Raises:
        InputError: if no condition had an effect.
    """

    def __init__(self, losses: Losses, seed: int, warn: Callable[[str], None]) -> None:
        require_kind("losses", losses, Losses, "as a causal metric keeps them")
        require_whole("seed", seed, 0)
        require_function("warn", warn)
        self._losses = losses
        self._seed = seed
        self._warn = warn
        self._warn_of_ineffective()
        self._effective = {condition.key for condition in losses.effective_conditions}

    def _warn_of_ineffective(self) -> None:
        """Warn of each condition that had no effect, with the reason; raise InputError if none had any."""
        conditions = list(self._losses.conditions.values())
        reasons = {condition.key: self._losses.no_effect_reason(condition) for condition in conditions}
        for condition in conditions:
            reason = reasons[condition.key]
            if reason:
                self._warn(f"{condition.label} is missing: {reason}")
            for point in self._losses.unchanged_points(condition):
                self._warn(f"{condition.label}: every text already had the value that it writes at {point}")
        if conditions and all(reasons.values()):
            listed = dict.fromkeys(f"{condition.label}: {reasons[condition.key]}" for condition in conditions)
            raise finding_error(f"no condition had an effect: {'; '.join(listed)}")

    def texts(self) -> Iterator[tuple[Any, ...]]:
        """Yield one row per text and condition."""
        indices = self._losses.indices
        n_predicted = self._losses.n_predicted(indices)
        reported = self._effective | {BASELINE.key}
        for condition in (BASELINE, *self._losses.conditions.values()):
            losses = self._losses.by_text(condition, indices)
            for index, loss, n in zip(indices, losses, n_predicted, strict=True):
                if not n:
                    self._warn(
                        f"text {self._losses.names[index]!r}: one token, so nothing is predicted: loss is missing"
                    )
                has_loss = condition.key in reported and loss == loss
                yield (
                    self._losses.names[index],
                    condition.name,
                    condition.layer,
                    condition.head,
                    loss if has_loss else None,
                    n,
                    condition.seed,
                )

    def conditions(self) -> list[tuple[Any, ...]]:
        """Return one row per condition, the baseline first."""
        return with_adjusted_p(self._conditions(), _P_OF_CONDITION)

    def _conditions(self) -> Iterator[tuple[Any, ...]]:
        from phaselens.uncertainty import compare_conditions

        indices = self._losses.predicted_by_content
        n_predicted = self._losses.n_predicted(indices)
        lengths = [self._losses.lengths[index] for index in indices]
        baseline = self._losses.by_text(BASELINE, indices)
        groups = list(self._losses.repeats.items())
        columns = [self._mean_over_seeds(group, indices) for _, group in groups]
        comparisons = compare_conditions(
            baseline, _side_by_side([baseline, *columns]), n_predicted, lengths=lengths, seed=self._seed
        )
        of_baseline = comparisons[0]
        if of_baseline.ppl_baseline is None:
            self._warn(f"baseline: ppl is missing: {of_baseline.reasons['ppl_baseline']}")
        yield (
            BASELINE.name, None, None, of_baseline.ppl_baseline, *([None] * 5), of_baseline.n_texts, *([None] * 4),
            of_baseline.n_predicted, 1, of_baseline.ppl_baseline_length_weighted, None,
        )  # fmt: skip
        for (group_key, group), comparison in zip(groups, comparisons[1:], strict=True):
            if not all(condition.key in self._effective for condition in group):
                yield (
                    *group_key,
                    *([None] * 6),
                    comparison.n_texts,
                    *([None] * 4),
                    comparison.n_predicted,
                    len(group),
                    None,
                    None,
                )
                continue
            self._explain(group[0].label, comparison.reasons)
            yield (
                *group_key, comparison.ppl, comparison.ratio, comparison.ci_low, comparison.ci_high,
                comparison.delta_nats, comparison.p_value, comparison.n_texts, comparison.delta_low,
                comparison.delta_high, comparison.d_z, comparison.share_worse, comparison.n_predicted, len(group),
                comparison.ppl_length_weighted, comparison.ratio_length_weighted,
            )  # fmt: skip

    def contrasts(self) -> list[tuple[Any, ...]]:
        """Return one row per condition and control."""
        return with_adjusted_p(self._contrasts(), _P_OF_CONTRAST)

    def _contrasts(self) -> Iterator[tuple[Any, ...]]:
        from phaselens.uncertainty import compare_arms

        indices = self._losses.predicted_by_content
        n_predicted = self._losses.n_predicted(indices)
        groups = self._losses.repeats
        for (name, layer, head), controls in groups.items():
            treated_name = controls[0].control_for
            treated = groups.get((treated_name, layer, head)) if treated_name is not None else None
            if treated is None:
                continue
            if not all(condition.key in self._effective for condition in (*treated, *controls)):
                continue
            repeats = _side_by_side([self._losses.by_text(control, indices) for control in controls])
            comparison = compare_arms(
                self._mean_over_seeds(treated, indices), repeats, n_predicted=n_predicted, seed=self._seed
            )
            self._explain(f"{treated_name} − {name}", comparison.reasons)
            yield (
                treated_name, name, layer, head, comparison.difference, comparison.ci_low, comparison.ci_high,
                comparison.p_value, comparison.d_z, comparison.n_texts, comparison.n_seeds,
            )  # fmt: skip

    def _mean_over_seeds(self, group: Sequence[Condition], indices: Sequence[int]) -> np.ndarray:
        """Return the loss [text] of one condition, its repeats averaged text by text."""
        import numpy as np

        repeats = np.stack([self._losses.by_text(condition, indices) for condition in group])
        # Deviations from the first repeat are averaged, so that the mean of equal repeats is exact.
        mean: np.ndarray = repeats[0] + (repeats - repeats[0]).mean(0)
        return mean

    def _explain(self, label: str, reasons: Mapping[str, str]) -> None:
        """Warn of each reason for which fields of a comparison are missing."""
        fields_by_reason: dict[str, list[str]] = {}
        for field, reason in reasons.items():
            if field in _FIELDS:
                fields_by_reason.setdefault(reason, []).append(field)
        for reason, fields in fields_by_reason.items():
            self._warn(f"{label}: {', '.join(fields)} missing: {reason}")


def _side_by_side(columns: Sequence[np.ndarray]) -> np.ndarray:
    """Stack columns [text] into one array [text, column]."""
    import numpy as np

    return np.stack(columns, axis=1)
