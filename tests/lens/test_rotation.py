"""Nulling the rotation removes the angles and keeps the factor that YaRN and longrope put into cos and sin."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import phaselens
from phaselens.errors import InputError, RefusedModel
from phaselens.lens import run_checks
from phaselens.lens.rotation import detect_rotation
from phaselens.patching import Experiment, prompt
from phaselens.testing import tiny_model
from phaselens.testing.models import tiny_tokenizer
from tests.marks import mark_later_slow

SCALED: dict[str, tuple[str, dict[str, Any], float]] = {
    "yarn": ("llama", {"rope_type": "yarn", "factor": 4.0}, 0.1 * math.log(4) + 1),
    "yarn, another factor": ("llama", {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5}, 1.5),
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
    fields = {"original_max_position_embeddings": 32} if family == "phi3" else {}
    return tiny_model(family, dtype=dtype, rope_parameters=scaling, **fields)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCALED)
def test_queries_and_keys_keep_the_attention_factor_and_lose_the_rotation(name):
    factor = SCALED[name][2]
    lens = phaselens.load(model_of(name), positions="nope")
    assert set(lens.info.positions) == {"nope"}
    activations: dict[str, torch.Tensor] = {}

    def keep(point: str) -> Any:
        return lambda value, hook: activations.__setitem__(point, value)

    points = [
        f"blocks.{layer}.attn.hook_{tensor}" for layer in (0, 1) for tensor in ("k", "rot_k", "q", "rot_q")
    ]
    lens.stream(TOKENS, [(point, keep(point)) for point in points])
    for layer in (0, 1):
        for tensor in ("q", "k"):
            unrotated = activations[f"blocks.{layer}.attn.hook_{tensor}"]
            rotated = activations[f"blocks.{layer}.attn.hook_rot_{tensor}"]
            assert torch.allclose(rotated, factor * unrotated.view(rotated.shape), rtol=1e-6, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCALED)
def test_logits_are_those_of_the_model_with_cos_of_the_factor_and_sin_of_zero(name):
    factor, model = SCALED[name][2], model_of(name)

    def still(_module: Any, _args: Any, cos_sin: Any) -> Any:
        return torch.full_like(cos_sin[0], factor), torch.zeros_like(cos_sin[1])

    model.set_attn_implementation("eager")
    handle = model.model.rotary_emb.register_forward_hook(still)
    with torch.no_grad():
        expected = model(TOKENS, use_cache=False).logits
    handle.remove()
    lens = phaselens.load(model, positions="nope")
    assert torch.allclose(lens.stream(TOKENS, unembed=True), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", mark_later_slow([torch.float64, torch.float32, torch.bfloat16]))
@pytest.mark.parametrize("name", SCALED)
def test_nulling_on_loading_while_running_and_in_an_experiment_is_bit_equal(name, dtype):
    loaded = phaselens.load(model_of(name, dtype), positions="nope")
    lens = phaselens.load(model_of(name, dtype))
    rotated = lens.stream(TOKENS, unembed=True)
    lens.set_rotation(nulled=True)
    expected = loaded.stream(TOKENS, unembed=True)
    assert torch.equal(lens.stream(TOKENS, unembed=True), expected)
    # Without hooks the model's own modules run; with one, the lens' components.
    hooked = lens.stream(TOKENS, [("blocks.1.attn.hook_rot_q", lambda value, hook: None)], unembed=True)
    assert torch.equal(hooked, expected)
    lens.set_rotation(nulled=False)
    assert torch.equal(lens.stream(TOKENS, unembed=True), rotated)


@pytest.mark.slow
def test_an_experiment_nulls_as_loading_does():
    lens = phaselens.load(model_of("yarn"), tokenizer=tiny_tokenizer())
    loaded = phaselens.load(model_of("yarn"), positions="nope")
    Experiment(prompt(lens, "to be or")).null_rope()
    assert torch.equal(lens.stream(TOKENS, unembed=True), loaded.stream(TOKENS, unembed=True))


def test_positions_have_no_effect_in_a_nulled_yarn_model():
    """With one layer, the last query attends to a set of keys, whose order does not matter."""
    scaling = {
        "rope_type": "yarn",
        "factor": 4.0,
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 32,
    }
    model = tiny_model("llama", dtype=torch.float64, rope_parameters=scaling, num_hidden_layers=1)
    lens = phaselens.load(model, positions="nope")
    mixed = TOKENS[:, [0, 7, 3, 1, 2, 6, 5, 4, *range(8, 20)]]
    ordered, shuffled = (lens.stream(ids, unembed=True)[:, -1] for ids in (TOKENS, mixed))
    assert torch.allclose(ordered, shuffled, rtol=1e-9, atol=1e-9)


def test_nulling_and_restoring_update_the_facts():
    lens = phaselens.load(tiny_model("llama"))
    rotated = lens.stream(TOKENS)
    assert lens.set_rotation(1, nulled=True) == (1,)
    assert lens.set_rotation([0, 1], nulled=True) == (0,)
    assert lens.set_rotation(nulled=True) == ()
    assert lens.nulled_layers == (0, 1)
    assert lens.info.positions == detect_rotation(lens) == ("nope", "nope")
    assert lens.set_rotation(0, nulled=False) == (0,)
    assert lens.info.positions == detect_rotation(lens) == ("rope", "nope")
    with lens.nulled_rotation([0]):
        assert lens.nulled_layers == (0,)
        assert lens.info.positions == detect_rotation(lens) == ("nope", "rope")
    assert lens.nulled_layers == (1,)
    with lens.nulled_rotation([]):
        assert torch.equal(lens.stream(TOKENS), rotated)
    assert lens.info.positions == ("rope", "nope")


@pytest.mark.slow
def test_a_layer_that_never_rotated_is_not_nulled():
    lens = phaselens.load(tiny_model("smollm3"), positions="nope")
    assert lens.info.positions == ("nope", "nope")
    assert lens.nulled_layers == (0,)
    assert lens.set_rotation(nulled=False) == (0,)
    assert lens.info.positions == ("rope", "nope")
    dropped = phaselens.load(tiny_model("llama-drope-nope"))
    assert dropped.set_rotation(nulled=True) == dropped.nulled_layers == ()


def test_learned_positions_are_refused_and_nothing_changes():
    lens = phaselens.load(tiny_model("gpt2"))
    with pytest.raises(
        RefusedModel, match="layer 0 has 'learned' positions, which are not given as cos and sin"
    ):
        lens.set_rotation(nulled=True)
    assert lens.nulled_layers == ()
    assert set(lens.info.positions) == {"learned"}
    for layers, problem in (
        (2, "has layers 0 to 1"),
        (-1, "layer -1"),
        ("1", "whole number"),
        ([0.5], "0.5"),
    ):
        with pytest.raises(InputError, match=problem):
            lens.set_rotation(layers, nulled=True)


def test_an_interrupted_switch_leaves_the_rotation_as_it_was():
    lens = phaselens.load(tiny_model("llama"))

    def interrupt(value: torch.Tensor, hook: Any) -> None:
        raise KeyboardInterrupt

    with lens.hooks(fwd_hooks=[("blocks.1.hook_in", interrupt)]), pytest.raises(KeyboardInterrupt):
        lens.set_rotation(nulled=True)
    assert lens.nulled_layers == ()
    assert lens.info.positions == ("rope", "rope")


@pytest.mark.slow
@pytest.mark.parametrize("rotation_mode", ["auto", "nope"])
def test_the_self_check_compares_with_the_rotation_of_loading(rotation_mode):
    lens = phaselens.load(tiny_model("llama"), positions=rotation_mode)
    lens.set_rotation(0, nulled=rotation_mode == "auto")
    assert all(result.ok for result in run_checks(lens))
    assert lens.nulled_layers == ((0,) if rotation_mode == "auto" else (1,))
