"""A model that TransformerLens' adapter does not fit is restored, and served from its measured parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import nn
from transformer_lens.model_bridge.supported_architectures.llama import LlamaArchitectureAdapter

import phaselens
from phaselens.lens.structural_adapter import StructuralAdapter
from phaselens.lens.unwrapping import Unwrapped
from phaselens.testing import tiny_model
from tests.lens.conftest import text


def swap_norms(adapter: Any) -> None:
    parts = adapter.component_mapping["blocks"].submodules
    parts["ln1"], parts["ln2"] = parts["ln2"], parts["ln1"]


def rename_mlp(adapter: Any) -> None:
    adapter.component_mapping["blocks"].submodules["mlp"].name = "feed_forward"


def refuse(adapter: Any) -> None:
    raise NotImplementedError("this configuration is not supported")


@pytest.mark.slow
@pytest.mark.parametrize("fault", [swap_norms, rename_mlp, refuse])
@pytest.mark.parametrize("check", [True, "report"])
def test_a_faulty_adapter_is_replaced_by_the_measured_anatomy(
    fault: Callable[[Any], None], check: bool | Literal["report"], monkeypatch: pytest.MonkeyPatch
) -> None:
    initialise = LlamaArchitectureAdapter.__init__

    def initialise_with_fault(adapter: Any, config: Any) -> None:
        initialise(adapter, config)
        fault(adapter)

    with torch.no_grad():
        expected = tiny_model("llama-gqa")(text()).logits
    monkeypatch.setattr(LlamaArchitectureAdapter, "__init__", initialise_with_fault)
    lens = phaselens.load(tiny_model("llama-gqa"), check=check)
    assert isinstance(lens.adapter, StructuralAdapter)
    assert torch.equal(lens.stream(text(), unembed=True), expected)


def test_an_adapter_that_fits_is_used() -> None:
    assert isinstance(phaselens.load(tiny_model("llama-gqa")).adapter, LlamaArchitectureAdapter)


def test_a_model_that_fails_either_way_is_refused_for_the_first_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse_anatomy(model: Any) -> None:
        raise phaselens.RefusedModel("the anatomy cannot be measured; use another model")

    initialise = LlamaArchitectureAdapter.__init__

    def swapped(adapter: Any, config: Any) -> None:
        initialise(adapter, config)
        swap_norms(adapter)

    monkeypatch.setattr(LlamaArchitectureAdapter, "__init__", swapped)
    monkeypatch.setattr("phaselens.lens.loading.measure_anatomy", refuse_anatomy)
    with pytest.raises(phaselens.RefusedModel, match="failed its check"):
        phaselens.load(tiny_model("llama-gqa"))


def test_a_restored_model_has_its_own_modules_and_hooks() -> None:
    model = tiny_model("llama-gqa")
    calls: list[nn.Module] = []
    handle = model.model.layers[0].register_forward_hook(lambda module, _args, _output: calls.append(module))
    names = [(name, type(module)) for name, module in model.named_modules()]
    unwrapped = Unwrapped.of(model)
    phaselens.load(model)
    assert [(name, type(module)) for name, module in model.named_modules()] != names
    unwrapped.restore()
    assert [(name, type(module)) for name, module in model.named_modules()] == names
    calls.clear()
    model(text())
    assert calls == [model.model.layers[0]]
    handle.remove()
    model(text())
    assert len(calls) == 1
