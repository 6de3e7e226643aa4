"""Choices of one forward are repeated in another where they nearly tie, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import phaselens
from phaselens.lens import run_checks
from phaselens.lens.choices import recorded_choices, repeated_choices
from tests.lens.mixtures import tiny_mixture

TOKENS = torch.zeros(1, 3, dtype=torch.long)
# Scores [token, expert] in which experts 1 and 2 nearly tie for the first two tokens, and not for the third.
SCORES = torch.tensor([[0.0, 1.000, 0.999, -1.0], [0.0, 1.000, 0.999, -1.0], [0.0, 1.0, 0.5, -1.0]])
OTHER = torch.tensor([[0.0, 0.999, 1.000, -1.0], [0.0, 0.999, 1.000, -1.0], [0.0, 0.5, 1.0, -1.0]])


def _largest_by_topk(scores: Tensor) -> tuple[Tensor, Tensor]:
    return torch.topk(scores, 1)


def _largest_by_method(scores: Tensor) -> tuple[Tensor, Tensor]:
    return scores.topk(k=1, dim=1, sorted=False)


def _largest_by_column(scores: Tensor) -> tuple[Tensor, Tensor]:
    values, indices = scores.T.topk(1, dim=0)
    return values.T, indices.T


def _largest_by_max(scores: Tensor) -> tuple[Tensor, Tensor]:
    return scores.max(dim=-1, keepdim=True)


def _largest_by_argmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    indices = torch.argmax(scores, dim=-1)[:, None]
    return scores.gather(-1, indices), indices


@pytest.mark.parametrize(
    "choose",
    [_largest_by_topk, _largest_by_method, _largest_by_column, _largest_by_max, _largest_by_argmax],
)
def test_near_ties_are_repeated_with_the_second_forwards_own_scores(choose: Any) -> None:
    with recorded_choices(TOKENS) as choices:
        choose(SCORES)
    with repeated_choices(choices, 0.01):
        values, indices = choose(OTHER)
    assert indices[:, 0].tolist() == [1, 1, 2]
    torch.testing.assert_close(values[:, 0], torch.tensor([0.999, 0.999, 1.0]))
    assert choose(OTHER)[1][:, 0].tolist() == [2, 2, 2]


def test_comparisons_with_a_bound_are_repeated_where_they_nearly_tie() -> None:
    def exceeds(scores: Tensor) -> Tensor:
        return scores > 0.5

    with recorded_choices(TOKENS) as choices:
        exceeds(torch.tensor([[0.501, 1.0], [0.499, 1.0], [0.9, 1.0]]))
    with repeated_choices(choices, 0.01):
        outcomes = exceeds(torch.tensor([[0.499, 1.0], [0.501, 1.0], [0.1, 1.0]]))
    assert outcomes.tolist() == [[True, True], [False, True], [False, True]]


def test_choices_are_repeated_in_the_order_of_their_line() -> None:
    def choose(scores: Tensor) -> Tensor:
        return scores.topk(1).indices

    with recorded_choices(TOKENS) as choices:
        choose(SCORES), choose(OTHER)
    with repeated_choices(choices, 0.01):
        first, second = choose(OTHER), choose(SCORES)
    assert first[:2, 0].tolist() == [1, 1]
    assert second[:2, 0].tolist() == [2, 2]


def test_choices_of_a_batch_are_split_and_joined_by_text() -> None:
    def choose(scores: Tensor) -> list[int]:
        return scores.topk(1).indices[:, 0].tolist()

    with recorded_choices(torch.zeros(2, 3)) as of_both:
        choose(torch.cat([SCORES, OTHER]))
    with repeated_choices(of_both.of_text(1, 2), 0.01):
        assert choose(SCORES[:2]) == [2, 2]
    first, second = of_both.of_text(0, 3), of_both.of_text(1, 3)
    with repeated_choices(second.beside(first), 0.01):
        assert choose(torch.cat([SCORES, OTHER])) == [2, 2, 1, 1, 1, 2]


@pytest.mark.parametrize("scores", [SCORES[:2], SCORES[:, :2]], ids=["fewer tokens", "fewer experts"])
def test_choices_that_do_not_fit_are_not_repeated(scores: Tensor) -> None:
    def choose(scores: Tensor) -> list[int]:
        return scores.topk(1).indices[:, 0].tolist()

    with recorded_choices(TOKENS) as choices:
        choose(OTHER)
    with repeated_choices(choices, 0.01):
        assert choose(scores) == [1] * len(scores)


def _difference(measured: Tensor, expected: Tensor) -> float:
    return float((measured.double() - expected.double()).abs().max() / expected.double().abs().max())


def test_a_mixture_differs_by_rounding_alone_once_its_experts_are_repeated() -> None:
    model = tiny_mixture("mixtral")
    tokens = torch.randint(67, (2, 48), generator=torch.Generator().manual_seed(0))
    noise = torch.randn(1, 24, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        with recorded_choices(tokens) as choices:
            in_batch = model(tokens, use_cache=False).logits[:1, :24]
        model.get_input_embeddings().register_forward_hook(
            lambda _module, _args, embedded: embedded * (1 + 1e-3 * noise)
        )
        free = model(tokens[:1, :24], use_cache=False).logits
        with repeated_choices(choices.of_text(0, 24), 0.06):
            repeated = model(tokens[:1, :24], use_cache=False).logits
    assert _difference(free, in_batch) > 0.05  # a choice tipped
    assert _difference(repeated, in_batch) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mixture_that_chooses_other_experts_than_its_own_fails_its_check(dtype: torch.dtype) -> None:
    lens = phaselens.load(tiny_mixture("glm4_moe", dtype), check="report")
    assert all(result.ok for result in run_checks(lens))
    with torch.no_grad():
        gate = lens.original_model.model.layers[2].mlp.gate
        gate.e_score_correction_bias += torch.linspace(0.0, 1.0, len(gate.e_score_correction_bias))
    failed = [result.name for result in run_checks(lens) if not result.ok]
    assert "logits, nothing hooked inside" in failed
