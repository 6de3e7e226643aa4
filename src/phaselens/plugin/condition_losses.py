"""Losses of texts under conditions, collected one text at a time, and whether each condition had an effect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from phaselens.errors import require_kind
from phaselens.plugin.conditions import BASELINE, Condition, ConditionGroup, ConditionKey, TextOutcome
from phaselens.plugin.states import restored

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class TextLoss:
    """Mean loss of one text in nats per predicted token, under one condition."""

    loss: float
    n_predicted: int


@dataclass
class EditEffect:
    """The effect of an edit: whether it wrote to any row, and whether that changed a value."""

    written: bool = False
    changed: bool = False
    #: The edit writes a number. If the activation has that value already, this is a finding, not an error.
    constant: bool = False

    def merge(self, other: EditEffect) -> None:
        """Add what the same edit did in other batches."""
        self.written |= other.written
        self.changed |= other.changed


@dataclass
class Losses:
    """The default state of a causal metric: one loss per text and condition, and the effects of edits.

    Two that saw different texts can be merged in any order.
    """

    conditions: dict[ConditionKey, Condition] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    contents: dict[int, str] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)
    text_losses: dict[ConditionKey, dict[int, TextLoss]] = field(default_factory=dict)
    effects: dict[ConditionKey, dict[str, EditEffect]] = field(default_factory=dict)

    def state(self) -> dict[str, Any]:
        """Return everything that was collected, as plain values, without the edits: they are needed no longer, and
        may hold functions."""
        import numpy as np

        losses = [
            {
                "condition": key,
                "indices": np.array(list(by_text), dtype=np.int64),
                "loss": np.array([text.loss for text in by_text.values()], dtype=np.float64),
                "n_predicted": np.array([text.n_predicted for text in by_text.values()], dtype=np.int64),
            }
            for key, by_text in self.text_losses.items()
        ]
        return {
            "conditions": {key: replace(condition, edits=()) for key, condition in self.conditions.items()},
            "names": dict(self.names),
            "contents": dict(self.contents),
            "lengths": dict(self.lengths),
            "losses": losses,
            "effects": {key: dict(effects) for key, effects in self.effects.items()},
        }

    def load_state(self, tree: Mapping[str, Any]) -> None:
        """Restore what `state` returned, in place of everything collected so far."""
        require_kind("tree", tree, Mapping, "as Losses.state returns it")
        self.conditions, self.effects = restored(tree["conditions"]), restored(tree["effects"])
        self.names, self.contents = dict(tree["names"]), dict(tree["contents"])
        self.lengths = dict(tree["lengths"])
        self.text_losses = {
            stored["condition"]: {
                index: TextLoss(loss, n_predicted)
                for index, loss, n_predicted in zip(
                    *(stored[name].tolist() for name in ("indices", "loss", "n_predicted")), strict=True
                )
            }
            for stored in tree["losses"]
        }

    def add(self, condition: Condition, outcome: TextOutcome) -> None:
        """Keep the mean loss of one text under a condition."""
        self.names[outcome.index], self.contents[outcome.index] = outcome.text, outcome.content
        self.lengths[outcome.index] = outcome.length
        n = len(outcome.loss)
        mean = float(outcome.loss.mean(dtype="float64")) if n else float("nan")
        self.text_losses.setdefault(condition.key, {})[outcome.index] = TextLoss(mean, n)

    def add_effects(self, condition: Condition, effects: Mapping[str, EditEffect]) -> None:
        """Add what each edit of a condition did in one batch, by hook point."""
        merged = self.effects.setdefault(condition.key, {})
        for point, effect in effects.items():
            merged.setdefault(point, EditEffect(constant=effect.constant)).merge(effect)

    def merge(self, other: Losses) -> None:
        """Add everything that `other` collected."""
        self.conditions.update(other.conditions)
        self.names.update(other.names)
        self.contents.update(other.contents)
        self.lengths.update(other.lengths)
        for key, losses in other.text_losses.items():
            self.text_losses.setdefault(key, {}).update(losses)
        for key, effects in other.effects.items():
            self.add_effects(self.conditions[key], effects)

    @property
    def indices(self) -> list[int]:
        """Indices of the texts, in order."""
        return sorted(self.names)

    @property
    def by_content(self) -> list[int]:
        """Indices of the texts in an order that depends only on their content; random draws use this order."""
        return sorted(self.names, key=lambda index: (self.contents[index], self.names[index]))

    @property
    def predicted_by_content(self) -> list[int]:
        """Indices of the texts that have a predicted token, in the order of `by_content`."""
        return [index for index in self.by_content if self.has_predictions(index)]

    def by_text(self, condition: Condition, indices: Sequence[int]) -> np.ndarray:
        """Return the loss [text] of these texts in nats per predicted token; NaN for a text without one."""
        import numpy as np

        losses = self.text_losses.get(condition.key, {})
        return np.array([losses[index].loss if index in losses else np.nan for index in indices])

    def n_predicted(self, indices: Sequence[int]) -> np.ndarray:
        """Return the number of predicted tokens [text]."""
        import numpy as np

        losses = self.text_losses[BASELINE.key]
        return np.array([losses[index].n_predicted for index in indices])

    def has_predictions(self, index: int) -> bool:
        """Return whether the text has a predicted token."""
        return self.text_losses[BASELINE.key][index].n_predicted > 0

    def no_effect_reason(self, condition: Condition) -> str | None:
        """Return why the condition is not reported (one of its edits had no effect); None if all had one."""
        for point, effect in self.effects.get(condition.key, {}).items():
            if not effect.written:
                return f"its edit of {point} found no value to edit in any text"
            if not effect.changed and not effect.constant:
                return f"its edit of {point} changed no value"
        return None

    @property
    def repeats(self) -> dict[ConditionGroup, list[Condition]]:
        """Conditions grouped by name, layer and head, in order; those of one group differ only in their seed."""
        groups: dict[ConditionGroup, list[Condition]] = {}
        for condition in self.conditions.values():
            groups.setdefault(condition.group, []).append(condition)
        return groups

    @property
    def effective_conditions(self) -> list[Condition]:
        """The conditions whose edits all had an effect, in order."""
        return [
            condition for condition in self.conditions.values() if self.no_effect_reason(condition) is None
        ]

    def unchanged_points(self, condition: Condition) -> list[str]:
        """Return the hook points where every text already had the number that the condition writes."""
        effects = self.effects.get(condition.key, {}).items()
        return [
            point for point, effect in effects if effect.written and not effect.changed and effect.constant
        ]
