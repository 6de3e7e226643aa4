"""A model on which traps are measured: its lens, its dense float64 twin, and runs of our metrics on the same texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tools.traps.dense import DenseModel, DenseText

if TYPE_CHECKING:
    from phaselens import HookedTransformer, Run

#: Bundled texts of different lengths, so that a batch of them has pads; they are cut at `MAX_TOKENS`.
TEXT_NUMBERS = (0, 5, 10, 13, 20, 40)
MAX_TOKENS = 96
#: The length to which scripts pad.
PADDED_LENGTH = 256
METRICS = (
    "sinks", "attention-patterns", "bos-norm", "compression", "massive-values", "layer-balance", "bos-write",
)  # fmt: skip


@dataclass(frozen=True)
class TrapNumbers:
    """One quantity: from a dense float64 computation, from our metric, and from the script. None is missing."""

    reference: float | None
    measured: float | None
    script: float | None


@dataclass(frozen=True)
class Trap:
    """One trap.

    Attributes:
        name: its heading on the page.
        quantity: what the numbers are, with their unit.
        least_error: the script is off by at least this much on the bundled RoPE model.
        measure: returns the numbers for a model.
        tolerance: largest difference of our number from the reference, relative to it where it is above 1.
    """

    name: str
    quantity: str
    least_error: float
    measure: Callable[[Bench], TrapNumbers]
    tolerance: float = 1e-5

    def problems(self, numbers: TrapNumbers, least_error: float | None = None) -> list[str]:
        """Say that our number is off, or that the script's is not; `least_error` replaces the trap's."""
        reference, measured, script = numbers.reference, numbers.measured, numbers.script
        least = self.least_error if least_error is None else least_error
        problems = []
        if reference is None or measured is None:
            problems += [] if reference is measured else [f"ours is {measured}, the reference {reference}"]
        elif not abs(measured - reference) <= self.tolerance * max(1.0, abs(reference)):
            problems.append(f"ours is {measured}, the reference {reference}")
        if reference is not None and script is not None and abs(script - reference) < least:
            problems.append(f"the script is {script}, less than {least} from the reference {reference}")
        return problems


class Bench:
    """One model and its texts."""

    def __init__(self, name: str, lens: HookedTransformer, dense: DenseModel, texts: Sequence[str]) -> None:
        self.name, self.lens, self.dense, self.texts = name, lens, dense, list(texts)

    @classmethod
    def load(cls, name: str, text_numbers: Iterable[int] = TEXT_NUMBERS) -> Bench:
        """Load a model by its name, as the lens and as Hugging Face's own class; texts begin with BOS."""
        import phaselens
        from phaselens.data import read_texts
        from phaselens.lens.model_source import ModelSource

        bundled = read_texts("bundled")
        lens = phaselens.load(name, bos="always", dtype="float32", device="cpu")
        dense = DenseModel.load(ModelSource.identify(name).location)
        return cls(name, lens, dense, [bundled[number].text for number in text_numbers])

    def ids(self, text: str, max_tokens: int = MAX_TOKENS) -> list[int]:
        """Return the ids of a text."""
        ids: list[int] = self.lens.to_tokens(text)[0].tolist()[:max_tokens]
        return ids

    @cached_property
    def dense_texts(self) -> list[DenseText]:
        """All texts, one by one and without pads."""
        return [self.dense.forward(self.ids(text)) for text in self.texts]

    @cached_property
    def padded_texts(self) -> list[DenseText]:
        """All texts, padded on the right with EOS, as a script pads them; of the pattern, the column of key 0 alone."""
        eos = self.lens.tokenizer.eos_token_id
        padded = (self.ids(text) + [eos] * PADDED_LENGTH for text in self.texts)
        forwards = (self.dense.forward(ids[:PADDED_LENGTH], unembed=False) for ids in padded)
        return [replace(text, pattern=text.pattern[..., :1].clone()) for text in forwards]

    @cached_property
    def run(self) -> Run:
        """Our observational metrics on these texts, in padded batches."""
        return self.measure(METRICS)

    def measure(self, metrics: Any, max_tokens: int = MAX_TOKENS, **options: Any) -> Run:
        """Run metrics on these texts."""
        import phaselens

        return phaselens.run(self.lens, metrics=metrics, texts=self.texts, max_tokens=max_tokens, **options)

    def rows(self, metric: str, table: str, run: Run | None = None) -> list[dict[str, Any]]:
        """Return the rows of one of our tables."""
        rows: list[dict[str, Any]] = (run or self.run).table(metric, table).to_pylist()
        return rows

    def mean(
        self, metric: str, table: str, column: str, run: Run | None = None, **where: object
    ) -> float | None:
        """Return the mean of a column over the rows with these values; None without a value."""
        return mean(row[column] for row in self.rows(metric, table, run) if matches(row, where))


def matches(row: Mapping[str, Any], where: Mapping[str, object]) -> bool:
    """Return whether a row has these values."""
    return all(row[name] == value for name, value in where.items())


def mean(values: Iterable[Any]) -> float | None:
    """Return the mean of the values that are not missing; None without one."""
    present = [float(value) for value in values if value is not None]
    return sum(present) / len(present) if present else None


def largest(values: Iterable[Any]) -> float:
    """Return the largest value."""
    return max(float(value) for value in values)
