"""Batches hold every text once, within the bound, longest first."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from phaselens.data import pack
from phaselens.data.batching import MAX_PAD_SHARE, SMALL_BATCH


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 200))
def test_every_text_is_in_one_batch_and_batches_keep_the_bound(lengths: list[int], bound: int) -> None:
    batches = pack(lengths, bound)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or max(lengths[index] for index in batch) * len(batch) <= bound
    in_order = [lengths[index] for batch in batches for index in batch]
    assert in_order == sorted(lengths, reverse=True)


@given(st.lists(st.integers(1, 500), min_size=1, max_size=40), st.integers(50, 4000))
def test_batches_are_few_with_little_padding(lengths: list[int], bound: int) -> None:
    batches = pack(lengths, bound)
    for first, second in pairwise(batches):
        size = lengths[first[0]] * (len(first) + 1)
        pads = size - sum(lengths[index] for index in [*first, second[0]])
        assert size > bound or (size > SMALL_BATCH and pads > MAX_PAD_SHARE * size), (first, second)
    for batch in batches:
        size = lengths[batch[0]] * len(batch)
        pads = size - sum(lengths[index] for index in batch)
        assert size <= SMALL_BATCH or pads <= MAX_PAD_SHARE * size
