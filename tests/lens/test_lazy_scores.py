"""Lazy scores note what a module does to them, and refuse by name what one call of attention does not have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from phaselens.errors import RefusedModel
from phaselens.lens.lazy_masks import LazyMask
from phaselens.lens.lazy_scores import LazyScores, ScoreTerms

BATCH, HEADS, LENGTH, WIDTH = 2, 3, 5, 4
LOWEST = torch.finfo(torch.float32).min
GENERATOR = torch.Generator().manual_seed(0)
QUERY, KEY, VALUE = torch.randn(3, BATCH, HEADS, LENGTH, WIDTH, generator=GENERATOR)
CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
BIAS = torch.randn(HEADS, 1, LENGTH, generator=GENERATOR)


def attend_densely(terms: ScoreTerms, value: Tensor) -> Tensor:
    """Compute attention from the noted terms, in the plainest way."""
    scores = terms.query @ terms.key.transpose(-1, -2) * terms.scale
    for added in terms.added:
        scores = scores + added
    for mask in terms.masks:
        visible = mask.built_visible() if isinstance(mask, LazyMask) else mask
        scores = scores.masked_fill(~visible, -torch.inf)
    return scores.softmax(-1) @ value


def lazy(flat: bool = False) -> LazyScores:
    shape = (BATCH * HEADS, LENGTH, LENGTH) if flat else (BATCH, HEADS, LENGTH, LENGTH)
    return LazyScores(ScoreTerms(QUERY, KEY), shape, torch.float32, attend_densely, "Attention")


def causal_mask() -> LazyMask:
    return LazyMask(torch.Size((BATCH, 1, LENGTH, LENGTH)), torch.float32, torch.device("cpu"), None)


def additive_mask() -> Tensor:
    return torch.zeros(1, 1, LENGTH, LENGTH).masked_fill(~CAUSAL, LOWEST)


def in_place(scores: Any) -> Any:
    scores /= 2.0
    scores += BIAS
    scores.masked_fill_(~CAUSAL, LOWEST)
    return scores


#: What modules of transformers do with their scores, before the softmax.
COMPUTATIONS: dict[str, Callable[[Any], Any]] = {
    "GPT-J": lambda scores: scores / 2.0 + additive_mask(),
    "CodeGen": lambda scores: (scores + additive_mask()) / 2.0,
    "GPT-Neo": lambda scores: torch.where(CAUSAL, scores, torch.tensor(LOWEST)) + additive_mask(),
    "MPT": lambda scores: (scores * 0.5 + BIAS).masked_fill(~CAUSAL, LOWEST),
    "Falcon": lambda scores: (scores + BIAS[None]) * 0.5 + additive_mask(),
    "GPT": lambda scores: scores / 2.0 * CAUSAL.float() + -1e4 * (1 - CAUSAL.float()),
    "XGLM": lambda scores: torch.max(scores + additive_mask(), torch.full((), LOWEST)),
    "XLM": lambda scores: scores.masked_fill((~CAUSAL)[None, None].expand_as(scores), LOWEST),
    "in place": in_place,
}


@pytest.mark.parametrize("name", COMPUTATIONS)
def test_lazy_scores_compute_what_the_matrix_does(name: str) -> None:
    compute = COMPUTATIONS[name]
    expected = compute(QUERY @ KEY.transpose(-1, -2)).softmax(-1) @ VALUE
    weights = torch.nn.functional.dropout(torch.nn.functional.softmax(compute(lazy()), dim=-1), 0.1, False)
    torch.testing.assert_close(torch.matmul(weights.to(VALUE.dtype), VALUE), expected)


def test_a_lazy_mask_stands_for_the_additive_one() -> None:
    expected = ((QUERY @ KEY.transpose(-1, -2)) + additive_mask()).softmax(-1) @ VALUE
    torch.testing.assert_close((lazy() + causal_mask()).softmax(-1) @ VALUE, expected)
    hidden = causal_mask().to(torch.bool)
    torch.testing.assert_close(lazy().masked_fill(hidden, LOWEST).softmax(-1) @ VALUE, expected)


def test_heads_and_texts_may_share_a_dimension() -> None:
    alibi = torch.randn(BATCH * HEADS, 1, LENGTH, generator=GENERATOR)
    flat = [states.reshape(BATCH * HEADS, LENGTH, WIDTH) for states in (QUERY, KEY, VALUE)]
    mask = additive_mask()[0].expand(BATCH * HEADS, -1, -1)
    expected = (flat[0] @ flat[1].transpose(-1, -2) + alibi + mask).softmax(-1) @ flat[2]
    scores = (lazy(flat=True) + alibi).view(BATCH, HEADS, LENGTH, LENGTH) + causal_mask()
    weights = scores.softmax(-1).view(BATCH * HEADS, LENGTH, -1)
    torch.testing.assert_close(torch.bmm(weights, flat[2]), expected)


def test_an_operation_changes_only_its_result() -> None:
    scores = lazy()
    doubled, masked = scores * 2.0, scores + causal_mask()
    assert (scores.terms.scale, doubled.terms.scale, masked.terms.scale) == (1.0, 2.0, 1.0)
    assert (len(scores.terms.masks), len(masked.terms.masks)) == (0, 1)


@pytest.mark.parametrize(
    ("compute", "operation"),
    [
        (lambda scores: scores.transpose(-1, -2), "calls Tensor.transpose"),
        (lambda scores: torch.tanh(scores), "calls tanh"),
        (lambda scores: scores.softmax(1), "takes the softmax over dimension 1"),
        (lambda scores: scores @ VALUE, "before the softmax"),
        (lambda scores: scores.softmax(-1) * 2.0, "multiplies attention after the softmax"),
        (lambda scores: scores.softmax(-1) + BIAS, "adds to attention after the softmax"),
        (lambda scores: scores * BIAS, "multiplies them by a matrix"),
        (lambda scores: scores * -1.0, "multiplies them by -1"),
        (lambda scores: scores + 1.0, "adds something other than a mask or a bias"),
        (lambda scores: scores + torch.zeros(7), r"combines them with a tensor of shape \[1, 1, 1, 7\]"),
        (lambda scores: scores.masked_fill(~CAUSAL, -10.0), "fills them with -10"),
        (lambda scores: scores.view(BATCH, -1), "reshapes them"),
        (lambda scores: torch.nn.functional.dropout(scores.softmax(-1), 0.1, True), "drops some at random"),
        (lambda scores: torch.max(scores, torch.zeros(())), "bounds them by 0"),
    ],
)
def test_anything_else_is_refused_by_name(compute: Callable[[LazyScores], object], operation: str) -> None:
    with pytest.raises(RefusedModel, match=f"^Attention .*{operation}") as refused:
        compute(lazy())
    assert "\n" not in str(refused.value)
