"""Uniform attention against the matrix of equal weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from phaselens import attention

SIZES = [(n, window) for n in (1, 2, 3, 7) for window in (None, 1, 2, 3, 6, 7, 8)]


def uniform(n: int, window: int | None) -> Tensor:
    """Equal weights of the visible keys, [query, key], float64."""
    query, key = torch.arange(n)[:, None], torch.arange(n)
    visible = ((key <= query) & (key > query - (window or n))).double()
    return visible / visible.sum(-1, keepdim=True)


@pytest.mark.parametrize(("n", "window"), SIZES)
def test_masses_are_those_of_equal_weights(n: int, window: int | None) -> None:
    weights = uniform(n, window)
    assert attention.n_seeing(n, window).tolist() == (weights > 0).sum(0).tolist()
    torch.testing.assert_close(attention.uniform_sink_rows(n, window), weights[:, 0])
    torch.testing.assert_close(attention.uniform_received(n, window), weights.sum(0))
    distances = [weights.diagonal(-distance).sum() for distance in range(n)]
    torch.testing.assert_close(attention.uniform_distance(n, window), torch.stack(distances))
    entropy = torch.special.entr(weights).sum(-1).mean()
    assert attention.uniform_entropy(n, window) == pytest.approx(float(entropy), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(("n", "window"), SIZES)
@pytest.mark.parametrize("include_query0", [False, True])
def test_sinks_are_those_of_equal_weights(n: int, window: int | None, include_query0: bool) -> None:
    weights, first = uniform(n, window), 0 if include_query0 else 1
    for position in range(n):
        column = weights[first:, position]
        column = column[column > 0]
        null = attention.uniform_sink(n, include_query0, position, window)
        assert null == (pytest.approx(float(column.mean()), rel=1e-12) if len(column) else None)
    assert attention.uniform_sink(n, include_query0, position=n, window=window) is None
    shares = 1 / ((weights > 0).sum(-1)[first:] + 1.0)
    null = attention.uniform_learned_sink(n, include_query0, window)
    assert null == (pytest.approx(float(shares.mean()), rel=1e-6) if len(shares) else None)


def test_query_0_is_left_out_unless_it_is_included() -> None:
    for null in (attention.uniform_sink, attention.uniform_learned_sink):
        assert null(5) == null(5, include_query0=False)
        assert null(5) != null(5, include_query0=True)
    assert attention.uniform_sink(5) == attention.uniform_sink(5, position=0)


@pytest.mark.parametrize(("n", "window"), SIZES)
@pytest.mark.parametrize("width", [0, 1, 2, 9])
@pytest.mark.parametrize("include_self", [False, True])
@pytest.mark.parametrize("exclude_first", [False, True])
def test_local_masses_are_those_of_equal_weights(
    n: int, window: int | None, width: int, include_self: bool, exclude_first: bool
) -> None:
    weights = uniform(n, window)
    query, key = torch.arange(n)[:, None], torch.arange(n)
    counts = (key >= query - width) & (key < query + int(include_self)) & (key >= int(exclude_first))
    mass = attention.uniform_window(
        n, width, include_self=include_self, exclude_first=exclude_first, window=window
    )
    torch.testing.assert_close(mass, (weights * counts).sum(-1))


NULLS = (
    attention.uniform_sink,
    attention.uniform_learned_sink,
    attention.n_seeing,
    attention.uniform_sink_rows,
    attention.uniform_entropy,
    attention.uniform_received,
    attention.uniform_distance,
    lambda n_tokens, **options: attention.uniform_window(n_tokens, 2, **options),
)


@pytest.mark.parametrize("null", NULLS)
def test_a_text_has_at_least_one_token_and_a_window_one_key(null: Callable[..., Any]) -> None:
    for n_tokens in (0, -2):
        with pytest.raises(ValueError, match=f"^expected a text of at least 1 token, received {n_tokens}$"):
            null(n_tokens)
    with pytest.raises(
        ValueError, match=r"^expected n_tokens as a whole number of at least 1, received 2\.0$"
    ):
        null(2.0)
    with pytest.raises(ValueError, match=r"^expected a window of at least 1 key .* received 0$"):
        null(4, window=0)
    null(1, window=1)


def test_positions_and_widths_are_counted_from_0() -> None:
    with pytest.raises(ValueError, match=r"^expected position as a whole number of at least 0, received -1$"):
        attention.uniform_sink(4, position=-1)
    with pytest.raises(ValueError, match=r"^expected width as a whole number of at least 0, received -1$"):
        attention.uniform_window(4, -1)
