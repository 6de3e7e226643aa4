"""Shards: the units of work of a run, each a fixed set of texts in fixed batches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from phaselens.data import TokenizedText, pack

DEFAULT_SHARD_TOKENS = 65_536


@dataclass(frozen=True)
class Shard:
    """A set of texts (or prompts) that is measured as one, and their batches.

    `index` counts the shards. `members` are indices of the run's texts; the batches hold each of them once.
    """

    index: int
    members: tuple[int, ...]
    batches: tuple[tuple[int, ...], ...]
    n_tokens: int


def cut_shards(texts: Sequence[TokenizedText], shard_tokens: int, batch_tokens: int) -> list[Shard]:
    """Cut texts into shards of at most `shard_tokens` tokens; a longer text is a shard of its own.

    The cut depends on the content of the texts and on the two numbers alone: texts are taken in the order of their
    length and hash. The longest come first, so that a batch that does not fit into memory fails at once.
    """
    order = sorted(
        range(len(texts)),
        key=lambda index: (-len(texts[index].ids), texts[index].text.sha256, texts[index].text.id),
    )
    groups: list[list[int]] = []
    n_tokens = 0
    for index in order:
        n_tokens += len(texts[index].ids)
        if not groups or n_tokens > shard_tokens:
            groups.append([])
            n_tokens = len(texts[index].ids)
        groups[-1].append(index)
    return [_shard(number, members, texts, batch_tokens) for number, members in enumerate(groups)]


def _shard(number: int, members: Sequence[int], texts: Sequence[TokenizedText], batch_tokens: int) -> Shard:
    lengths = [len(texts[index].ids) for index in members]
    batches = tuple(tuple(members[position] for position in batch) for batch in pack(lengths, batch_tokens))
    return Shard(number, tuple(members), batches, sum(lengths))


def shard_key(texts: Sequence[TokenizedText], shard: Shard) -> str:
    """Return a digest of the texts of a shard: their indices, ids, content and tokens."""
    digest = hashlib.sha256()
    for index in shard.members:
        text = texts[index]
        digest.update(repr((index, text.text.id, text.text.sha256, text.ids)).encode())
    return digest.hexdigest()


def digest_of(value: object) -> str:
    """Return the sha256 of a value of plain JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
