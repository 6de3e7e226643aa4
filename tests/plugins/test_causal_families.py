"""Causal metrics on every model type that is served give the losses of the unwrapped model under plain hooks."""

from __future__ import annotations

import random
import sys
import time
from typing import Any

import numpy as np
import pytest
import torch
from tools.families.models import tiny_model
from tools.families.page import PAGE, SERVED, verdicts
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

import phaselens
from phaselens.lens.blocks import original_module
from phaselens.lens.points import in_layer
from tests.plugins.ablations import content
from tests.plugins.overwritten_cells import record_cells
from tests.plugins.test_causal_modules import (
    TEXTS,
    hooked,
    losses_of,
    plain_losses,
    zero_at_bos,
    zero_everywhere,
)
from tests.toys import toy_tokenizer

PAGE_TEXT = PAGE.read_text(encoding="utf-8")
TYPES = [name for name, verdict in verdicts(PAGE_TEXT).items() if verdict == SERVED]
#: Those that run in float64, where rounding tips no choice of an expert; the others run in float32.
IN_FLOAT64 = {name for name, verdict in verdicts(PAGE_TEXT, "float64").items() if verdict == SERVED}
#: Norms and softmaxes of many models are computed in float32 even then.
NATS = 2e-5
METRICS = {
    "bos-mlp": {"at": "sweep", "seeds": 0},
    "layer-ablation": {"part": "each", "seeds": 0},
    "qk-disruption": {"conditions": "top-1", "seeds": 1},
}
CONDITIONS = {
    "hook_mlp_out": (("bos-mlp", "each layer", zero_at_bos), ("layer-ablation", "MLP off", zero_everywhere)),
    "hook_attn_out": (("layer-ablation", "attention off", zero_everywhere),),
}


def plain_model(model_type: str) -> Any:
    return tiny_model(model_type).to(torch.float64 if model_type in IN_FLOAT64 else torch.float32)


def contributors(lens: Any, layer: int, point: str) -> list[nn.Module]:
    """Return the model's modules whose outputs a layer adds to the residual at a hook point; none without the point."""
    hook, block = lens.find_hook(in_layer(layer, point)), lens.blocks[layer]
    plan = getattr(block, "plan", None)
    if hook is None:
        return []
    if plan is not None and point in plan.weighted:
        return [original_module(block.submodules[term.name]) for term in plan.weighted[point]]
    parts = (module for module in block.modules() if getattr(module, "hook_out", None) is hook)
    return [original_module(part) for part in parts]


class EagerAttention:
    """The eager attention of a model's own source, with cells of queries and keys set to 0."""

    def __init__(self, layers: tuple[int, ...], cells: dict[tuple[int, str], np.ndarray]) -> None:
        self.layers, self.cells, self.n_calls = layers, cells, 0
        AttentionInterface.register("plain_edited", self)
        AttentionMaskInterface.register("plain_edited", eager_mask)

    def __call__(self, module: Any, query: Tensor, key: Tensor, *args: Any, **options: Any) -> Any:
        layer = self.layers[self.n_calls]
        self.n_calls += 1
        states = {"q": query, "k": key}
        for name in states:
            if (layer, name) in self.cells:
                mask = torch.from_numpy(self.cells[layer, name])[:, :, None]
                states[name] = states[name].masked_fill(mask, 0.0)
        attend = sys.modules[type(module).__module__].eager_attention_forward
        return attend(module, *states.values(), *args, **options)


def differences(model_type: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Return the largest difference between measured losses and those under plain hooks, by condition, if too large."""
    cells_by_text = record_cells(monkeypatch)
    model, plain = plain_model(model_type), plain_model(model_type)
    names = {id(module): name for name, module in model.named_modules()}
    lens = phaselens.load(model, label="m", check=False)
    lens.text_tokenizer = toy_tokenizer()
    chosen = {
        name: params
        for name, params in METRICS.items()
        if name != "qk-disruption" or lens.info.attention_layers
    }
    result = phaselens.run(lens, metrics=chosen, texts=TEXTS)
    failures = {name: str(metric.failures[0]) for name, metric in result.metrics.items() if metric.failures}
    assert failures == {}, model_type
    gaps: dict[str, float] = {}

    def compare(metric: str, condition: str, layer: int | None) -> None:
        measured = losses_of(result, metric, condition, layer)
        if len(measured):
            gaps[f"{metric}: {condition} in {layer}"] = float(np.abs(measured - plain_losses(plain)).max())

    compare("bos-mlp", "baseline", None)
    for layer in range(lens.info.n_layers):
        for point, conditions in CONDITIONS.items():
            modules = [plain.get_submodule(names[id(module)]) for module in contributors(lens, layer, point)]
            for metric, condition, edit in conditions if modules else ():
                with hooked(modules, edit):
                    compare(metric, condition, layer)
    if cells_by_text and calls_the_interface(plain, lens.info.attention_layers):
        cells = {
            point: np.stack([by_text[content(text)] for text in TEXTS])
            for point, by_text in cells_by_text.items()
        }
        edited = EagerAttention(lens.info.attention_layers, cells)
        plain.set_attn_implementation("plain_edited")
        compare("qk-disruption", "top-1", None)
        assert edited.n_calls == len(edited.layers), model_type
    return {condition: gap for condition, gap in gaps.items() if not gap <= NATS}


def calls_the_interface(model: Any, layers: tuple[int, ...]) -> bool:
    """Return whether every layer with attention calls the interface, from a source that has eager attention."""
    counter = EagerAttention(layers, {})
    model.set_attn_implementation("plain_edited")
    try:
        plain_losses(model)
    except (AttributeError, IndexError):
        return False
    return counter.n_calls == len(layers)


@pytest.mark.slow
def test_a_random_pair_of_types_gives_the_losses_under_plain_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    seed = time.time_ns() % 10**6
    sample = random.Random(seed).sample(TYPES, 2)
    assert {name: gaps for name in sample if (gaps := differences(name, monkeypatch))} == {}, f"seed {seed}"


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TYPES)
def test_every_type_gives_the_losses_under_plain_hooks(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert differences(model_type, monkeypatch) == {}
