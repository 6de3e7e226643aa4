"""The loss with the rotation nulled tells a checkpoint whose configuration rotates what was trained without."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional

import phaselens
from phaselens.data import Text, texts_from
from phaselens.lens.model_source import ModelSource
from phaselens.lens.nulled_loss import NulledLoss, compare_nulled_loss
from phaselens.testing import tiny_lens, tiny_model, tiny_tokenizer

TEXTS = [Text("a", "to be or not to be"), Text("b", "that is the question"), Text("c", "x")]


def lying_copy(folder: Path) -> Path:
    """A copy of the bundled DroPE model whose configuration calls it a Llama, as if trained under a patch."""
    for file in Path(ModelSource.identify("drope").location).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    del config["attention_type"]
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.slow
def test_a_nope_model_that_calls_itself_llama_is_recognised(tmp_path) -> None:
    lens = phaselens.load(lying_copy(tmp_path), check=False)
    loss = compare_nulled_loss(lens, texts_from("bundled", 8))
    assert isinstance(loss, NulledLoss)
    assert loss.looks_like_nope
    assert loss.nulled < loss.configured
    assert loss.low <= loss.nulled - loss.configured <= loss.high < 0
    assert lens.info.positions == ("rope",) * 6
    nulled = phaselens.load(tmp_path, positions="nope", check=False)
    again = compare_nulled_loss(nulled, texts_from("bundled", 8))
    assert again == loss
    assert nulled.info.positions == ("nope",) * 6


@pytest.mark.slow
def test_a_rotary_model_is_worse_without_its_rotation() -> None:
    loss = compare_nulled_loss(phaselens.load("rope", check=False), texts_from("bundled", 8))
    assert isinstance(loss, NulledLoss)
    assert loss.nulled > loss.configured
    assert not loss.looks_like_nope
    assert str(loss) == (
        f"loss on 8 bundled texts: {loss.configured:.3f} nats per token with the rotation as configured, "
        f"{loss.nulled:.3f} with the rotation nulled"
    )


def test_losses_are_the_means_over_texts_of_the_models_own_cross_entropy() -> None:
    lens, model = tiny_lens("qwen2"), tiny_model("qwen2", dtype=torch.float64)
    loss = compare_nulled_loss(lens, TEXTS)
    assert isinstance(loss, NulledLoss)
    expected = []
    for text in TEXTS:
        ids = torch.tensor(tiny_tokenizer()(text.text)["input_ids"])[None]
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        expected.append(float(functional.cross_entropy(logits, ids[0, 1:])))
    assert loss.configured == pytest.approx(math.fsum(expected) / 3, abs=1e-5)
    assert loss.n_texts == 3
    assert loss.uniform == pytest.approx(math.log(67))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_random_model_looks_like_nothing(seed) -> None:
    loss = compare_nulled_loss(tiny_lens("llama", seed=seed), TEXTS)
    assert isinstance(loss, NulledLoss)
    assert not loss.looks_like_nope


def test_the_verdict_needs_a_clear_change_and_a_model_that_predicts() -> None:
    def verdict(configured: float, nulled: float, high: float) -> bool:
        return NulledLoss(configured, nulled, nulled - configured - 1, high, 4.0, 9).looks_like_nope

    assert verdict(3.5, 3.0, -0.4)
    assert not verdict(3.5, 3.0, 0.1)
    assert not verdict(3.5, 3.495, -0.004)
    assert not verdict(6.0, 5.0, -0.9)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gpt2", "no layer rotates queries and keys"),
        ("llama-drope-nope", "no layer rotates queries and keys"),
    ],
)
def test_without_a_rotation_nothing_is_compared(family, reason) -> None:
    assert compare_nulled_loss(tiny_lens(family), TEXTS) == reason


def test_missing_texts_and_losses_are_told_with_the_reason() -> None:
    assert (
        compare_nulled_loss(phaselens.load(tiny_model("llama"), check=False))
        == "there is no tokenizer for the texts"
    )
    assert compare_nulled_loss(tiny_lens("llama"), TEXTS[:1]) == "fewer than two texts have two tokens"
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    lens = phaselens.load(model, tokenizer=tiny_tokenizer(), check=False)
    assert compare_nulled_loss(lens, TEXTS) == "the loss is not a finite number"
