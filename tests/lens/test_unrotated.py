"""Nulling the rotation removes the angles and keeps the factor that YaRN and longrope put into cos and sin."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import phaselens
from phaselens.lens.positions import null_rotation, restore_rotation
from phaselens.patching import Experiment, prompt
from phaselens.testing import tiny_model
from phaselens.testing.models import tiny_tokenizer
from tests.marks import first_quick

SCALED: dict[str, tuple[str, dict[str, Any], float]] = {
    "yarn": ("llama", {"rope_type": "yarn", "factor": 4.0}, 0.1 * math.log(4) + 1),
    "yarn, a factor of its own": ("llama", {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5}, 1.5),
    "longrope": (
        "phi3",
        {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
        math.sqrt(1 + math.log(4) / math.log(32)),
    ),
    "linear": ("llama", {"rope_type": "linear", "factor": 4.0}, 1.0),
    "llama3": (
        "llama",
        {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        1.0,
    ),
    "default": ("llama", {"rope_type": "default"}, 1.0),
}  # fmt: skip
TOKENS = torch.arange(3, 23)[None]


def model_of(name: str, dtype: torch.dtype = torch.float64) -> Any:
    family, scaling, _ = SCALED[name]
    scaling = {"rope_theta": 10000.0, "original_max_position_embeddings": 32, **scaling}
    # Phi-3's configuration has the original length beside its rotation as well.
    beside = {"original_max_position_embeddings": 32} if family == "phi3" else {}
    return tiny_model(family, dtype=dtype, rope_parameters=scaling, **beside)


@pytest.mark.parametrize("name", SCALED)
def test_queries_and_keys_keep_the_attention_factor_and_lose_the_rotation(name):
    factor = SCALED[name][2]
    lens = phaselens.load(model_of(name), positions="nope")
    assert set(lens.info.positions) == {"nope"}
    seen: dict[str, torch.Tensor] = {}

    def keep(point: str) -> Any:
        return lambda value, hook: seen.__setitem__(point, value)

    points = [f"blocks.{layer}.attn.hook_{part}" for layer in (0, 1) for part in ("k", "rot_k", "q", "rot_q")]
    lens.stream(TOKENS, [(point, keep(point)) for point in points])
    for layer in (0, 1):
        for part in ("q", "k"):
            before = seen[f"blocks.{layer}.attn.hook_{part}"]
            after = seen[f"blocks.{layer}.attn.hook_rot_{part}"]
            assert torch.allclose(after, factor * before.view(after.shape), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", SCALED)
def test_logits_are_those_of_the_model_with_cos_of_the_factor_and_sin_of_zero(name):
    factor, model = SCALED[name][2], model_of(name)

    def still(_module: Any, _args: Any, out: Any) -> Any:
        return torch.full_like(out[0], factor), torch.zeros_like(out[1])

    model.set_attn_implementation("eager")
    handle = model.model.rotary_emb.register_forward_hook(still)
    with torch.no_grad():
        expected = model(TOKENS, use_cache=False).logits
    handle.remove()
    lens = phaselens.load(model, positions="nope")
    assert torch.allclose(lens.stream(TOKENS, unembed=True), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", first_quick([torch.float64, torch.float32, torch.bfloat16]))
@pytest.mark.parametrize("name", SCALED)
def test_nulled_on_loading_while_running_and_in_an_experiment_is_the_same_to_the_bit(name, dtype):
    loaded = phaselens.load(model_of(name, dtype), positions="nope")
    lens = phaselens.load(model_of(name, dtype))
    rotated = lens.stream(TOKENS, unembed=True)
    null_rotation(lens)
    expected = loaded.stream(TOKENS, unembed=True)
    assert torch.equal(lens.stream(TOKENS, unembed=True), expected)
    # Also where the model's own modules run, because nobody listens, and where somebody does.
    heard = lens.stream(TOKENS, [("blocks.1.attn.hook_rot_q", lambda value, hook: None)], unembed=True)
    assert torch.equal(heard, expected)
    restore_rotation(lens)
    assert torch.equal(lens.stream(TOKENS, unembed=True), rotated)


def test_an_experiment_nulls_as_loading_does():
    lens = phaselens.load(model_of("yarn"), tokenizer=tiny_tokenizer())
    loaded = phaselens.load(model_of("yarn"), positions="nope")
    Experiment(prompt(lens, "to be or")).nope()
    assert torch.equal(lens.stream(TOKENS, unembed=True), loaded.stream(TOKENS, unembed=True))


def test_no_position_matters_in_a_nulled_yarn_model():
    """One layer, so that the last query sees a set of keys: in any order they give the same."""
    scaling = {
        "rope_type": "yarn",
        "factor": 4.0,
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 32,
    }
    model = tiny_model("llama", dtype=torch.float64, rope_parameters=scaling, num_hidden_layers=1)
    lens = phaselens.load(model, positions="nope")
    mixed = TOKENS[:, [0, 7, 3, 1, 2, 6, 5, 4, *range(8, 20)]]
    first, second = (lens.stream(ids, unembed=True)[:, -1] for ids in (TOKENS, mixed))
    assert torch.allclose(first, second, rtol=1e-9, atol=1e-9)
