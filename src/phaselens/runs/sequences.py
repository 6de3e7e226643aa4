"""Batches of the token sequences that metrics read instead of the run's texts."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phaselens.data import Text, TokenizedText
from phaselens.data.batching import MAX_PAD_SHARE
from phaselens.plugin import Metric, TokenSequence
from phaselens.plugin.return_checks import sequences_of
from phaselens.runs.batches import make_batch

if TYPE_CHECKING:
    from phaselens.lens import HookedTransformer

DEFAULT_BATCH_TOKENS = 8192


@dataclass(frozen=True)
class SequencePlan:
    """The sequences of one metric, as tokenized texts, and the batches in which they are read.

    `indices` are indices of `tokenized`, batch by batch; `rotation_modes` has the rotation mode of each batch.
    `segments` has the segments of each sequence's keys.
    """

    tokenized: Sequence[TokenizedText]
    indices: Sequence[Sequence[int]]
    rotation_modes: Sequence[str]
    segments: Sequence[Sequence[int] | None]

    @property
    def n_tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(len(text.ids) for text in self.tokenized)

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
            labels[row, :n_tokens] = (
                torch.zeros(n_tokens, dtype=torch.long) if segments is None else torch.tensor(segments)
            )
        n_segments = 1 + max(max(segments, default=0) for segments in self.segments if segments is not None)
        with lens.segmented(labels, max(1, n_segments)):
            yield

    def batches(self) -> Iterator[tuple[Sequence[int], str]]:
        """Yield the indices and the rotation mode of each batch."""
        return zip(self.indices, self.rotation_modes, strict=True)


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
    return SequencePlan(
        tokenized,
        batches,
        [sequences[batch[0]].rotation_mode for batch in batches],
        [sequence.segments for sequence in sequences],
    )


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
