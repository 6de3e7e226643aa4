"""Losses of texts under conditions, gathered a text at a time, and the proof that each condition did something."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from phaselens.plugin.conditions import BASELINE, Condition, Outcome

if TYPE_CHECKING:
    import numpy as np

Key = tuple[str, int | None, int | None]


@dataclass(frozen=True)
class TextLoss:
    """Mean loss of one text in nats per predicted token, under one condition."""

    loss: float
    n_predicted: int


@dataclass
class Proof:
    """Whether an edit found anything to write on, and whether it then changed a value."""

    written: bool = False
    changed: bool = False
    #: The edit writes a number; that the number stands there already is a finding and no mistake.
    constant: bool = False

    def merge(self, other: Proof) -> None:
        """Take over what `other` saw."""
        self.written |= other.written
        self.changed |= other.changed


@dataclass
class Losses:
    """What a causal metric keeps by default: a number a text and condition, and the proofs.

    It can be pickled, and two that saw different texts can be merged in any order.
    """

    conditions: dict[Key, Condition] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    contents: dict[int, str] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)
    found: dict[Key, dict[int, TextLoss]] = field(default_factory=dict)
    proofs: dict[Key, dict[str, Proof]] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, object]:
        """Without the edits, which may hold functions that cannot be pickled, and have done their work."""
        kept = {key: replace(condition, edits=()) for key, condition in self.conditions.items()}
        return {**self.__dict__, "conditions": kept}

    def add(self, condition: Condition, outcome: Outcome) -> None:
        """Keep the mean loss of one text."""
        self.names[outcome.index], self.contents[outcome.index] = outcome.text, outcome.content
        self.lengths[outcome.index] = outcome.length
        n = len(outcome.loss)
        mean = float(outcome.loss.mean(dtype="float64")) if n else float("nan")
        self.found.setdefault(condition.key, {})[outcome.index] = TextLoss(mean, n)

    def prove(self, condition: Condition, seen: Mapping[str, Proof]) -> None:
        """Take in what each edit of a condition did in some batch, by hook point."""
        kept = self.proofs.setdefault(condition.key, {})
        for point, proof in seen.items():
            kept.setdefault(point, Proof(constant=proof.constant)).merge(proof)

    def merge(self, other: Losses) -> None:
        """Take over all that `other` gathered."""
        self.conditions.update(other.conditions)
        self.names.update(other.names)
        self.contents.update(other.contents)
        self.lengths.update(other.lengths)
        for key, found in other.found.items():
            self.found.setdefault(key, {}).update(found)
        for key, proofs in other.proofs.items():
            self.prove(self.conditions[key], proofs)

    @property
    def indices(self) -> list[int]:
        """The texts, in their order."""
        return sorted(self.names)

    @property
    def by_content(self) -> list[int]:
        """The texts in an order that depends on what they say alone; draws by chance follow it."""
        return sorted(self.names, key=lambda index: (self.contents[index], self.names[index]))

    def of(self, condition: Condition, indices: Sequence[int]) -> np.ndarray:
        """Loss [text] in nats per predicted token; NaN where there is none."""
        import numpy as np

        kept = self.found.get(condition.key, {})
        return np.array([kept[index].loss if index in kept else np.nan for index in indices])

    def n_predicted(self, indices: Sequence[int]) -> np.ndarray:
        """Predicted tokens [text]."""
        import numpy as np

        kept = self.found[BASELINE.key]
        return np.array([kept[index].n_predicted for index in indices])

    def predicts(self, index: int) -> bool:
        """Whether the text has a token that is predicted."""
        return self.found[BASELINE.key][index].n_predicted > 0

    def refusal(self, condition: Condition) -> str | None:
        """Why this condition is not reported, if one of its edits did nothing; None for one that worked."""
        for point, proof in self.proofs.get(condition.key, {}).items():
            if not proof.written:
                return f"its edit of {point} found nothing to change in any text"
            if not proof.changed and not proof.constant:
                return f"its edit of {point} changed nothing there"
        return None

    @property
    def working(self) -> list[Condition]:
        """The conditions whose edits all did what they said, in their order."""
        return [condition for condition in self.conditions.values() if self.refusal(condition) is None]

    def idle(self, condition: Condition) -> list[str]:
        """Points where the number to be written stood already, in every text."""
        proofs = self.proofs.get(condition.key, {}).items()
        return [point for point, proof in proofs if proof.written and not proof.changed and proof.constant]
