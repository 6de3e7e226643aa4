"""Readings of attention statistics against loops over the real tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from phaselens import attention

LENGTHS = torch.tensor([6, 4, 1])
ROWS = torch.rand(3, 2, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("first", "last"), [(0, None), (1, None), (1, 1), (2, 3), (0, 0), (3, 9), (4, 3)])
def test_the_mean_is_over_the_real_queries_from_the_first_to_the_last(first: int, last: int | None) -> None:
    means = attention.query_mean(ROWS, LENGTHS, first=first, last=last)
    assert (means.shape, means.dtype) == ((3, 2), torch.float64)
    for text, length in enumerate(LENGTHS.tolist()):
        rows = ROWS[text, :, first : length if last is None else min(length, last + 1)].double()
        torch.testing.assert_close(means[text], rows.mean(-1), equal_nan=True)
    assert torch.equal(attention.query_mean(ROWS, LENGTHS), attention.query_mean(ROWS, LENGTHS, first=0))


@pytest.mark.parametrize("position", [0, 1, 3])
@pytest.mark.parametrize("window", [None, 1, 2, 4])
@pytest.mark.parametrize("include_query0", [False, True])
def test_a_sink_score_is_the_mean_over_the_queries_that_see_the_key(
    position: int, window: int | None, include_query0: bool
) -> None:
    scores = attention.sink_score(
        ROWS, LENGTHS, include_query0=include_query0, position=position, window=window
    )
    for text, length in enumerate(LENGTHS.tolist()):
        queries = [
            query
            for query in range(length)
            if position <= query < position + (window or length) and (query > 0 or include_query0)
        ]
        torch.testing.assert_close(scores[text], ROWS[text][:, queries].double().mean(-1), equal_nan=True)


@pytest.mark.parametrize("window", [None, 1, 2, 3, 9])
def test_entropy_is_divided_by_the_logarithm_of_the_visible_keys(window: int | None) -> None:
    normalised = attention.normalised_entropy(ROWS, window=window)
    assert (normalised.shape, normalised.dtype) == (ROWS.shape, torch.float64)
    for query in range(6):
        n_visible = min(query + 1, window or 6)
        expected = ROWS[..., query].double() / (math.log(n_visible) if n_visible > 1 else math.nan)
        torch.testing.assert_close(normalised[..., query], expected, equal_nan=True)
    assert attention.normalised_entropy(torch.tensor([0.0, math.log(2)])).tolist()[1] == pytest.approx(1)


def test_concentration_counts_the_shares_of_real_keys() -> None:
    received = ROWS * 2
    values = attention.concentration(received, LENGTHS)
    assert (values.shape, values.dtype) == ((3, 2), torch.float64)
    for text, length in enumerate(LENGTHS.tolist()[:2]):
        share = received[text, :, :length].double() / length
        expected = 1 + (share * share.log()).sum(-1) / math.log(length)
        torch.testing.assert_close(values[text], expected)
    assert values[2].isnan().all()
    even = torch.ones(1, 1, 5)
    assert attention.concentration(even, torch.tensor([5])).item() == pytest.approx(0, abs=1e-12)
    assert attention.concentration(torch.tensor([[[2.0, 0.0, 9.0]]]), torch.tensor([2])).item() == 1.0


@pytest.mark.parametrize(
    ("call", "start"),
    [
        (lambda rows, lengths: attention.query_mean(rows, lengths), "rows [batch, head, query]"),
        (lambda rows, lengths: attention.sink_score(rows, lengths), "rows [batch, head, query]"),
        (lambda rows, lengths: attention.concentration(rows, lengths), "received [batch, head, key]"),
    ],
)
@pytest.mark.parametrize(
    ("rows", "lengths"),
    [(ROWS[0], LENGTHS), (ROWS[..., None], LENGTHS), (ROWS, LENGTHS[:2]), (ROWS, LENGTHS[:, None])],
)
def test_rows_and_lengths_that_do_not_fit_are_refused_with_their_shapes(
    call: Any, start: str, rows: torch.Tensor, lengths: torch.Tensor
) -> None:
    with pytest.raises(ValueError, match=r"^expected ") as caught:
        call(rows, lengths)
    assert str(caught.value) == (
        f"expected {start} and lengths [batch], received {tuple(rows.shape)} and {tuple(lengths.shape)}"
    )


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_lengths_have_any_dtype_of_whole_numbers(dtype: torch.dtype) -> None:
    for call in (attention.query_mean, attention.sink_score, attention.concentration):
        expected = call(ROWS, LENGTHS)
        torch.testing.assert_close(call(ROWS, LENGTHS.to(dtype)), expected, equal_nan=True)
        with pytest.raises(ValueError, match=r"^expected lengths \[batch\] .*, received torch.bool$"):
            call(ROWS, LENGTHS > 1)


@pytest.mark.parametrize("name", ["first", "last"])
def test_queries_are_counted_from_0(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^expected {name} as a whole number of at least 0, received -1$"):
        attention.query_mean(ROWS, LENGTHS, **{name: -1})
    with pytest.raises(ValueError, match=r"^expected position as a whole number of at least 0, received -1$"):
        attention.sink_score(ROWS, LENGTHS, position=-1)
    with pytest.raises(ValueError, match=r"^expected window as a whole number of at least 1, received 0$"):
        attention.normalised_entropy(ROWS, window=0)
    with pytest.raises(
        ValueError, match=r"^expected entropy as a tensor \[…, query\], received .* shape \(\)$"
    ):
        attention.normalised_entropy(torch.tensor(1.0))
