"""Batches of the token sequences that metrics read instead of the run's texts."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phaselens.data import Text, TokenizedText
from phaselens.data.batching import MAX_PAD_SHARE
from phaselens.plugin import Metric, TokenSequence
from phaselens.plugin.return_checks import sequences_of
from phaselens.runs.active_metrics import ActiveMetric, guarded
from phaselens.runs.batches import make_batch
from phaselens.runs.layer_pass import forward
from phaselens.runs.observer import Observer
from phaselens.runs.shards import Shard

if TYPE_CHECKING:
    from phaselens.lens import HookedTransformer

DEFAULT_BATCH_TOKENS = 8192


@dataclass(frozen=True)
class SequencePlan:
    """The sequences of one metric, as tokenized texts, and the batches in which they are read.

    `batches` hold indices of `tokenized`; `rotation_modes` has the rotation mode of each sequence, `segments` the
    segments of its keys.
    """

    tokenized: Sequence[TokenizedText]
    batches: Sequence[Sequence[int]]
    rotation_modes: Sequence[str]
    segments: Sequence[Sequence[int] | None]

    @property
    def n_tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(len(text.ids) for text in self.tokenized)

    def shards(self, shard_tokens: int) -> list[Shard]:
        """Return the batches in shards of at most `shard_tokens` tokens; a larger batch is a shard of its own."""
        groups: list[list[Sequence[int]]] = []
        n_tokens = 0
        for batch in self.batches:
            size = self._size(batch)
            n_tokens += size
            if not groups or n_tokens > shard_tokens:
                groups.append([])
                n_tokens = size
            groups[-1].append(batch)
        return [
            Shard(
                number,
                tuple(index for batch in batches for index in batch),
                tuple(map(tuple, batches)),
                sum(map(self._size, batches)),
            )
            for number, batches in enumerate(groups)
        ]

    @contextmanager
    def segmented(self, lens: HookedTransformer, indices: Sequence[int]) -> Iterator[None]:
        """Let `hook_segments` measure the segments of these sequences inside the context; pads are in none."""
        import torch

        if all(segments is None for segments in self.segments):
            yield
            return
        length = max(len(self.tokenized[index].ids) for index in indices)
        labels = torch.full((len(indices), length), -1)
        for row, index in enumerate(indices):
            n_tokens, segments = len(self.tokenized[index].ids), self.segments[index]
            labels[row, :n_tokens] = torch.tensor([0] * n_tokens if segments is None else list(segments))
        n_segments = 1 + max(max(segments, default=0) for segments in self.segments if segments is not None)
        with lens.segmented(labels, max(1, n_segments)):
            yield

    def _size(self, batch: Sequence[int]) -> int:
        return sum(len(self.tokenized[index].ids) for index in batch)


def plan_sequences(
    lens: HookedTransformer,
    metric: Metric[Any],
    tokenized_texts: Sequence[TokenizedText],
    indices: Sequence[int],
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
) -> SequencePlan | None:
    """Ask `metric` for its sequences, given the texts at `indices`, and pack them; None if it reads the texts."""
    # A copy: a metric that sets the pad token or side would change how all later texts are read.
    tokenizer = copy.deepcopy(lens.text_tokenizer)
    texts = make_batch(lens, tokenized_texts, indices)
    sequences = sequences_of(metric, texts.private_copy(), tokenizer)
    if sequences is None:
        return None
    tokenized = [
        TokenizedText(
            Text(sequence.id, " ".join(map(str, sequence.ids))), tuple(sequence.ids), len(sequence.ids)
        )
        for sequence in sequences
    ]
    batches = list(pack_groups(sequences, batch_tokens))
    rotation_modes = [sequence.rotation_mode for sequence in sequences]
    return SequencePlan(tokenized, batches, rotation_modes, [sequence.segments for sequence in sequences])


def plan_all_sequences(
    lens: HookedTransformer,
    active_metrics: Iterable[ActiveMetric],
    tokenized_texts: Sequence[TokenizedText],
    indices: Sequence[int],
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
) -> dict[str, SequencePlan]:
    """Return the sequences of the metrics that read their own, by the metric's name; record failures.

    `indices` are those of the texts from which a metric may make sequences.
    """
    plans = {}
    for active in active_metrics:
        if indices and active.points and active.metric.reads_own_sequences():
            with guarded(active.result, lens.info.label, "sequences"):
                plan = plan_sequences(lens, active.metric, tokenized_texts, indices, batch_tokens)
                if plan is not None:
                    plans[active.metric.name] = plan
    return plans


def read_sequences(
    lens: HookedTransformer,
    active: ActiveMetric,
    plan: SequencePlan,
    batches: Sequence[Sequence[int]],
    observer: Observer,
) -> None:
    """Pass some batches of a metric's sequences through the model."""
    for mode, same_mode in itertools.groupby(batches, key=lambda batch: plan.rotation_modes[batch[0]]):
        with guarded(active.result, lens.info.label, "sequences"), in_rotation_mode(lens, mode):
            for indices in same_mode:
                with plan.segmented(lens, indices):
                    batch = make_batch(lens, plan.tokenized, indices)
                    forward(lens, batch, [active], active.sink_position, observer)
                observer.advance(sum(len(plan.tokenized[index].ids) for index in indices))


def pack_groups(sequences: Sequence[TokenSequence], batch_tokens: int) -> Iterator[list[int]]:
    """Yield batches of the indices of sequences: whole groups of one rotation mode, at most `batch_tokens` with pads.

    Longest groups come first. A single group can be larger.

    >>> pair = [TokenSequence("a", [1, 2], "g"), TokenSequence("b", [3], None), TokenSequence("c", [1, 5], "g")]
    >>> list(pack_groups(pair, 4)), list(pack_groups(pair, 9))
    ([[0, 2], [1]], [[0, 2, 1]])
    """
    groups: dict[object, list[int]] = {}
    for index, sequence in enumerate(sequences):
        # An index and a name cannot be equal, so a sequence without a group joins none.
        groups.setdefault(index if sequence.group is None else sequence.group, []).append(index)

    def longest(members: list[int]) -> int:
        return max(len(sequences[index].ids) for index in members)

    ordered = sorted(groups.values(), key=lambda members: (-longest(members), members[0]))
    for mode in dict.fromkeys(sequence.rotation_mode for sequence in sequences):
        batch: list[int] = []
        for members in ordered:
            if sequences[members[0]].rotation_mode != mode:
                continue
            joined = [*batch, *members]
            n_padded = longest(joined) * len(joined)
            n_real = sum(len(sequences[index].ids) for index in joined)
            if batch and (n_padded > batch_tokens or n_padded - n_real > MAX_PAD_SHARE * n_padded):
                yield batch
                joined = members
            batch = list(joined)
        if batch:
            yield batch


@contextmanager
def in_rotation_mode(lens: HookedTransformer, mode: str) -> Iterator[None]:
    """Null the rotation of the model's layers inside the context if the mode says so."""
    if mode == "auto":
        yield
    else:
        with lens.nulled_rotation():
            yield
