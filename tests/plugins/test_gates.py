"""Mean gates of attention-patterns against the sigmoid that the model computes, and layers without a gate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import phaselens
from phaselens_plugins.attention_patterns import AttentionPatterns
from tests.lens.measured import RECIPES, model_of
from tests.toys import letters, toy_lens, toy_tokenizer

TEXTS = [letters(9), letters(24, 3), letters(2, 5)]


def rows(lens: Any, table: str) -> list[dict[str, Any]]:
    result = phaselens.run(lens, metrics=AttentionPatterns, texts=TEXTS)
    assert not result.failed
    return result.rows("attention-patterns", table).records()


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["qwen3_next", "qwen3_5_text"])
def test_the_mean_gate_is_that_of_the_models_sigmoid(
    monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    """Half of the query projection's output is the gate, head by head; the other layer has no softmax attention."""
    monkeypatch.setitem(RECIPES, model_type, RECIPES["qwen3_next"])
    model = model_of(model_type, torch.float64)
    lens = phaselens.load(model, label="gated", check=False)
    lens.text_tokenizer = toy_tokenizer()
    assert lens.info.gates == (1,)
    attention = lens.original_model.model.layers[1].self_attn
    projected: list[Tensor] = []
    handle = attention.q_proj.register_forward_hook(lambda _m, _a, output: projected.append(output.clone()))
    expected = []
    for text in TEXTS:
        projected.clear()
        lens.stream(torch.tensor([lens.text_tokenizer(text)["input_ids"]]))
        gate = projected[-1][0].view(-1, 4, 2, 8)[:, :, 1].sigmoid()
        expected.append(gate.mean((0, 2)))
    handle.remove()
    heads = [head for head in rows(lens, "heads") if head["layer"] == 1]
    assert [head["gate"] for head in heads] == pytest.approx(torch.stack(expected).mean(0).tolist(), abs=1e-9)
    assert [head["gate"] for head in rows(lens, "heads") if head["layer"] == 0] == [None] * 4


def test_heads_without_a_gate_have_one() -> None:
    assert {row["gate"] for row in rows(toy_lens("llama"), "texts")} == {1.0}


def test_a_norm_is_not_a_gate() -> None:
    lens = toy_lens("bitnet")
    assert (lens.info.head_outputs, lens.info.gates) == (("scaled", "scaled"), ())
    result = phaselens.run(lens, metrics=AttentionPatterns, texts=TEXTS)
    assert {row["gate"] for row in result.rows("attention-patterns", "texts").records()} == {None}
    assert any(
        "gate is missing in layer 0, 1: what follows the heads there is not a gate" in w
        for w in result.warnings
    )
