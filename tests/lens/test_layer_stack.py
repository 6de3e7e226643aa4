"""Models whose layers do not form one stack that runs once are refused, each with its own reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from phaselens.errors import RefusedModel
from phaselens.lens.wrapping import measure_anatomy
from phaselens.testing import tiny_model


class Routed(nn.ModuleList):
    """A list of layers that a forward runs in another order, given by their indices."""

    def __init__(self, layers: nn.ModuleList, order: tuple[int, ...]) -> None:
        super().__init__(list(layers))
        self.order = order

    def __getitem__(self, index: Any) -> Any:
        modules = list(self._modules.values())
        return [modules[number] for number in self.order] if isinstance(index, slice) else modules[index]


class Twice(nn.Module):
    """Attention that runs twice and adds both results, the second time on `factor` times its input."""

    def __init__(self, attention: nn.Module, factor: float) -> None:
        super().__init__()
        self.attention, self.factor = attention, factor

    def forward(self, hidden_states: torch.Tensor, **options: Any) -> Any:
        first, _ = self.attention(hidden_states, **options)
        second, weights = self.attention(hidden_states * self.factor, **options)
        return first + second, weights


def route(*order: int) -> Callable[[Any], None]:
    """Return a change of a model that makes it run its layers in this order."""

    def change(model: Any) -> None:
        model.model.layers = Routed(model.model.layers, order)

    return change


def share_attention(model: Any) -> None:
    model.model.layers[1].self_attn = model.model.layers[0].self_attn


def attend_twice(factor: float) -> Callable[[Any], None]:
    """Return a change of a model that makes its first layer attend twice."""

    def change(model: Any) -> None:
        layer = model.model.layers[0]
        layer.self_attn = Twice(layer.self_attn, factor)

    return change


def cases() -> Iterator[Any]:
    for name, change, reason in (
        ("reversed", route(1, 0), "do not run in the order of their list"),
        ("repeated", route(0, 1, 0, 1), "its layers run 2 times in one forward"),
        ("left out", route(0), "only 1 of its 2 layers run on text alone"),
        ("shared", share_attention, "share one attention module"),
        ("twice the same", attend_twice(1.0), "one attention pattern by its values in 2 parts"),
        ("two patterns", attend_twice(0.5), "calls the attention interface 2 times"),
    ):
        yield pytest.param(change, reason, id=name)


@pytest.mark.slow
@pytest.mark.parametrize(("change", "reason"), list(cases()))
def test_what_is_not_one_stack_of_layers_is_refused_with_the_reason(
    change: Callable[[Any], None], reason: str
) -> None:
    model = tiny_model("llama")
    assert measure_anatomy(model).stack.n_layers == 2
    change(model)
    with pytest.raises(RefusedModel, match=reason):
        measure_anatomy(model)
