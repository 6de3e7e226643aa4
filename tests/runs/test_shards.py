"""Shards depend on the texts' content and on two numbers, and on nothing else."""

from __future__ import annotations

import random

import pytest

from phaselens.data import Text, TokenizedText
from phaselens.runs.shards import cut_shards


def tokenized(length: int, name: str = "", content: str | None = None) -> TokenizedText:
    text = Text(name or str(length), f"text of {length}" if content is None else content)
    return TokenizedText(text, tuple(range(length)), length)


def contents(texts: list[TokenizedText], shard_tokens: int, batch_tokens: int = 64) -> list[list[list[str]]]:
    """The texts of every batch of every shard."""
    shards = cut_shards(texts, shard_tokens, batch_tokens)
    return [[[texts[index].text.text for index in batch] for batch in shard.batches] for shard in shards]


TEXTS = [tokenized(length) for length in (5, 40, 1, 7, 8, 9, 100, 2, 3, 30)]


def test_shards_and_batches_do_not_depend_on_the_order_of_the_texts() -> None:
    expected = contents(TEXTS, 50)
    for seed in range(5):
        shuffled = random.Random(seed).sample(TEXTS, len(TEXTS))
        assert contents(shuffled, 50) == expected


@pytest.mark.parametrize("shard_tokens", [1, 10, 50, 1000])
def test_every_text_is_in_one_batch_of_one_shard_of_the_size(shard_tokens: int) -> None:
    shards = cut_shards(TEXTS, shard_tokens, 16)
    members = [index for shard in shards for index in shard.members]
    assert sorted(members) == list(range(len(TEXTS)))
    assert [sorted(shard.members) for shard in shards] == [
        sorted(index for batch in shard.batches for index in batch) for shard in shards
    ]
    assert [shard.index for shard in shards] == list(range(len(shards)))
    for shard in shards:
        assert shard.n_tokens == sum(len(TEXTS[index].ids) for index in shard.members)
        assert shard.n_tokens <= shard_tokens or len(shard.members) == 1


def test_the_longest_texts_come_first() -> None:
    lengths = [len(TEXTS[index].ids) for shard in cut_shards(TEXTS, 20, 8) for index in shard.members]
    assert lengths == sorted(lengths, reverse=True)


def test_texts_of_equal_length_are_ordered_by_their_hash() -> None:
    texts = [tokenized(3, name, content) for name, content in (("x", "a"), ("y", "b"), ("z", "c"))]
    order = [texts[index].text.sha256 for shard in cut_shards(texts, 3, 8) for index in shard.members]
    assert order == sorted(order)


def test_no_text_gives_no_shard() -> None:
    assert cut_shards([], 10, 10) == []
