"""What every pass over the texts needs: metrics at work, what ends one of them, batches, memory."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from phaselens.data import Tokens
from phaselens.errors import InputError, PhaseLensError, require_kind, require_text
from phaselens.plugin import Batch, Metric
from phaselens.plugin.loading import FAULTS
from phaselens.plugin.mistakes import raised_at
from phaselens.plugin.settings import settings_kept
from phaselens.runs.result import Failure, MetricResult

if TYPE_CHECKING:
    from phaselens.lens import HookedTransformer


class TooLarge(InputError):  # noqa: N818 - what it is, as the other errors here
    """A batch that does not fit into memory: a matter of the run, not of the metric that met it."""


class Observer:
    """What a progress display is told. This one listens to nothing."""

    def loading(self, label: str) -> None:
        """A model is about to be loaded."""

    def measuring(self, label: str, n_tokens: int) -> None:
        """A model is about to see `n_tokens` tokens."""

    def advance(self, n_tokens: int) -> None:
        """It has seen `n_tokens` more."""


@dataclass
class Measured:
    """One metric at work on one model. A metric that raises is dropped, and its result says why."""

    metric: Metric[Any]
    result: MetricResult
    points: dict[str, tuple[int | None, str]] = field(default_factory=dict)
    sink_position: int = 0
    n_distances: int = 1

    @property
    def works(self) -> bool:
        """Whether it has not failed on this model."""
        return not any(failure.model == self.metric.model.label for failure in self.result.failures)


@contextmanager
def guarded(result: MetricResult, label: str, stage: str) -> Iterator[None]:
    """A metric's own failure ends that metric, not the run; nor does what it sets reach the others."""
    require_kind("result", result, MetricResult, "of the metric that is guarded")
    require_text("label", label)
    require_text("stage", stage)
    try:
        with settings_kept():
            yield
    except TooLarge:
        raise
    except FAULTS as error:  # it is recorded with its traceback and makes the run exit with 1
        text = "".join(traceback.format_exception(error))
        message = " ".join(str(error).split())
        where = _where(error, result.metric)
        result.failures.append(Failure(label, stage, type(error).__name__, message, text, where))


def _where(error: BaseException, author: type) -> str | None:
    """`file:line` in the author's file; none for what the metric says on purpose, by an InputError of its own."""
    built_in = author.__module__.startswith("phaselens_plugins.")
    if isinstance(error, PhaseLensError) and (built_in or not _raised_by_us(error)):
        return None
    return getattr(error, "where", None) or raised_at(error, author)


def _raised_by_us(error: BaseException) -> bool:
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and str(frames[-1].f_globals.get("__name__")).startswith("phaselens.")


def batch_of(lens: HookedTransformer, texts: Sequence[Tokens], indices: Sequence[int]) -> Batch:
    """Texts side by side, padded on the right with token 0, which no real token can see."""
    import torch

    lengths = [len(texts[index].ids) for index in indices]
    tokens = torch.zeros(len(indices), max(lengths), dtype=torch.long)
    for row, index in enumerate(indices):
        tokens[row, : lengths[row]] = torch.tensor(texts[index].ids)
    given = [texts[index].text for index in indices]
    return Batch(
        tuple(text.id for text in given),
        tuple(indices),
        tuple(lengths),
        tokens.to(lens.device),
        _speller(lens),
        tuple(text.sha256 for text in given),
    )


def _speller(lens: HookedTransformer) -> Callable[[int], str]:
    """What the tokenizer calls a token id; its number where it has no name."""

    def spell(token: int) -> str:
        named = lens.text_tokenizer.convert_ids_to_tokens(token)
        return named if isinstance(named, str) else str(token)

    return spell


@contextmanager
def memory_named(lens: HookedTransformer, batch: Batch) -> Iterator[None]:
    """Say what to do where memory runs out.

    Raises:
        TooLarge: naming the batch.
    """
    import torch

    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "memory" in str(error).lower():
            raise TooLarge(
                f"{lens.info.label}: a batch of {batch.n} × {batch.tokens.shape[1]} tokens does not fit "
                f"into the memory of {lens.device}; lower --batch-tokens or --max-tokens"
            ) from error
        raise
