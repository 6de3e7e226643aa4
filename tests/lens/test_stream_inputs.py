"""Inputs of `stream` that the model cannot take, and arguments of the lens' other methods, are refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from phaselens.errors import InputError
from tests.toys import toy_lens

TOKENS = torch.tensor([[0, 5, 7]])
RESIDUAL = torch.zeros(1, 3, 32)
POINT = "blocks.0.hook_mlp_out"


@pytest.fixture(scope="module")
def lens() -> Any:
    return toy_lens()


CALLS: list[tuple[Callable[[Any], object], str]] = [
    (lambda lens: lens.stream(TOKENS > 0), r"tokens as a tensor \[batch, pos\] of ids, received torch.bool"),
    (lambda lens: lens.stream(TOKENS.to(torch.complex64)), "received torch.complex64"),
    (lambda lens: lens.stream(residual="x", start_at_layer=1), r"residual as a tensor \[batch, pos, 32\].*'x'"),
    (lambda lens: lens.stream(residual=RESIDUAL[0], start_at_layer=1), r"received torch.float32 \[3, 32\]"),
    (lambda lens: lens.stream(residual=RESIDUAL[..., :5], start_at_layer=1), r"received torch.float32 \[1, 3, 5\]"),
    (lambda lens: lens.stream(residual=RESIDUAL.long(), start_at_layer=1), "received torch.int64"),
    (lambda lens: lens.stream(residual=RESIDUAL.double(), start_at_layer=1), "received torch.float64"),
    (lambda lens: lens.stream(residual=RESIDUAL, start_at_layer=9), "start_at_layer 9: llama has 2 layers"),
    (lambda lens: lens.stream(residual=RESIDUAL, start_at_layer=-9), "start_at_layer -9: llama has 2 layers"),
    (lambda lens: lens.stream(residual=RESIDUAL, start_at_layer=1, stop_at_layer=0), "0 is below start_at_layer 1"),
    (lambda lens: lens.stream(TOKENS, lengths=torch.tensor([1, 2])), "expected lengths of 1 texts, received 2"),
    (lambda lens: lens.stream(TOKENS, lengths=torch.tensor([9])), r"lengths from 0 to 3, .*, received \[9\]"),
    (lambda lens: lens.stream(TOKENS, lengths=torch.tensor([-1])), r"lengths from 0 to 3, .*, received \[-1\]"),
    (lambda lens: lens.stream(TOKENS, n_distances=10**12), "n_distances 1000000000000: give at most"),
    (lambda lens: lens.stream(TOKENS, sink_position=10**30), "sink_position as a whole number of at most"),
    (
        lambda lens: lens.stream(TOKENS, [(POINT, lambda tensor, hook: tensor[:, :1])]),
        r"the hook of blocks.0.hook_mlp_out returned \[1, 1, 32\]; return None, or a tensor of shape \[1, 3, 32\]",
    ),
    (lambda lens: lens.stream(TOKENS, [(POINT, lambda tensor, hook: "x")]), "the hook of .* returned 'x'"),
    (lambda lens: lens.weight_of(0, 3), "the name of a weight as text, received 3"),
    (lambda lens: lens.projection_of(0, None), "the name of a weight as text, received None"),
    (lambda lens: lens.require_hook(3), "the name of a hook point as text, received 3"),
    (lambda lens: lens.find_hook(None), "the name of a hook point as text, received None"),
    (lambda lens: lens.position_axis(3), "the name of a hook point as text, received 3"),
    (lambda lens: lens.to_tokens("\ud800"), "lone surrogate"),
    (lambda lens: lens.to_tokens("ab", padding_side="up"), "padding_side is 'up'; give 'left' or 'right'"),
    (lambda lens: lens.to_tokens("ab", prepend_bos="x"), "prepend_bos as True or False"),
    (lambda lens: lens.segmented(torch.tensor([[0, -5]])).__enter__(), "segments: -5; number segments from 0"),
    (lambda lens: lens.segmented(torch.tensor([[0, 10**12]])).__enter__(), "and at most"),
    (lambda lens: lens.segmented(torch.tensor([[0, 3]]), 2).__enter__(), "n_segments above the largest segment"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), CALLS, ids=range(len(CALLS)))
def test_errors_name_what_was_expected_and_received(
    lens: Any, call: Callable[[Any], object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        call(lens)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_ids_of_any_whole_type_are_tokens(lens: Any, dtype: torch.dtype) -> None:
    assert torch.equal(lens.stream(TOKENS.to(dtype)), lens.stream(TOKENS))


def test_a_forward_that_stops_where_it_starts_returns_its_residual(lens: Any) -> None:
    residual: Tensor = torch.rand(1, 3, 32)
    for layer in (0, 1, 2):
        stopped = lens.stream(residual=residual, start_at_layer=layer, stop_at_layer=layer)
        assert torch.equal(stopped, residual)
