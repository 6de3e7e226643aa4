"""The dimensions that rotations mix, compared with the pairs that each family's own code rotates."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import phaselens
from phaselens.lens.rotation_pairs import pairs_of, read_rotated_pairs
from phaselens.plugin import RotatedPairs
from phaselens.testing import tiny_model


def halves(rotary, start=0):
    return tuple((start + low, start + low + rotary // 2) for low in range(rotary // 2))


def neighbours(rotary):
    return tuple((low, low + 1) for low in range(0, rotary, 2))


def made(model_type, dtype=None, **fields):
    common = {
        "vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": 0,
        "eos_token_id": 1,
    }  # fmt: skip
    config = AutoConfig.for_model(model_type, **common | fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    return model.to(dtype or torch.float32).eval()


def rope(rope_type="default", theta=1e4, **fields):
    return {"rope_type": rope_type, "rope_theta": theta, **fields}


LONGROPE = {
    "short_factor": [1.0] * 6,
    "long_factor": [4.0] * 6,
    "original_max_position_embeddings": 32,
    "factor": 2.0,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = YARN | {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES = {
    "llama": (lambda: tiny_model("llama-gqa"), halves(8)),
    "one key head": (lambda: tiny_model("llama-mqa"), halves(8)),
    "norms of queries and keys": (lambda: tiny_model("qwen3"), halves(16)),
    "norms over all heads": (lambda: tiny_model("olmo2"), halves(8)),
    "centred norms": (lambda: made("stablelm", qk_layernorm=True), halves(2)),
    "a part of the head": (lambda: tiny_model("gpt-neox"), halves(4)),
    "phi-2": (
        lambda: made("phi", hidden_size=80, rope_parameters=rope(partial_rotary_factor=0.4)),
        halves(8),
    ),
    "phi-4-mini": (
        lambda: made("phi3", hidden_size=64, rope_parameters=rope("longrope", partial_rotary_factor=0.75, **LONGROPE)),
        halves(12),
    ),
    "cohere": (lambda: made("cohere", hidden_size=256, rope_parameters=rope(theta=8e6)), neighbours(64)),
    "glm": (lambda: made("glm", head_dim=16), neighbours(8)),
    "a very large base": (lambda: made("llama", hidden_size=512, rope_parameters=rope(theta=3.6e9)), halves(128)),
    "dynamic": (lambda: made("llama", rope_parameters=rope("dynamic", factor=4.0)), halves(8)),
    "linear": (lambda: made("llama", rope_parameters=rope("linear", factor=8.0)), halves(8)),
    "yarn": (lambda: made("llama", rope_parameters=rope("yarn", **YARN)), halves(8)),
    "llama3": (lambda: made("llama", rope_parameters=rope("llama3", **LLAMA3)), halves(8)),
    "queries scaled by position": (lambda: made("ministral3", head_dim=16), halves(16)),
    "queries and keys clipped in place": (lambda: made("olmo", hidden_size=64, clip_qkv=8.0), halves(16)),
    "bfloat16": (
        lambda: made("cohere", torch.bfloat16, hidden_size=256, rope_parameters=rope(theta=8e6)),
        neighbours(64),
    ),
    "float16": (lambda: made("llama", torch.float16, rope_parameters=rope("dynamic", factor=4.0)), halves(8)),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_pairs_are_those_that_the_family_rotates(name):
    make, pairs = CASES[name]
    info = phaselens.load(make(), check=False).info
    assert [rotation.pairs for rotation in info.rotations] == [pairs, pairs]
    assert {rotation.d_head for rotation in info.rotations} == {info.d_head}


@pytest.mark.slow
def test_layers_without_rotation_have_no_pairs():
    for family in ("smollm3", "cohere2"):
        rotated, unrotated = phaselens.load(tiny_model(family)).info.rotations
        assert rotated.pairs == (halves(8) if family == "smollm3" else neighbours(8))
        assert unrotated is None
    assert phaselens.load(tiny_model("gpt2")).info.rotations == (None, None)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt-neox", "smollm3"])
def test_a_nulled_rotation_keeps_the_pairs_that_it_would_mix(family):
    rotated, nulled = (
        phaselens.load(tiny_model(family), positions=rotation_mode).info for rotation_mode in ("auto", "nope")
    )
    assert set(nulled.positions) == {"nope"}
    assert nulled.rotations == rotated.rotations


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["llama-drope-nope", "llama-drope-qk-norm-nope", "qwen2-drope-k-norm-nope"]
)
def test_a_dropped_rotation_keeps_the_pairs_of_its_base_family(family):
    assert phaselens.load(tiny_model(family)).info.rotations == (RotatedPairs(halves(8), 8),) * 2


def test_weight_norms_are_not_norms_of_queries_and_keys():
    model = tiny_model("qwen3")
    for layer in model.model.layers:
        torch.nn.utils.parametrizations.weight_norm(layer.self_attn.q_proj)
        torch.nn.utils.parametrizations.weight_norm(layer.self_attn.o_proj)
    assert phaselens.load(model).info.rotations == (RotatedPairs(halves(16), 16),) * 2


def test_zero_weights_hide_no_pair():
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.zero_()
            layer.self_attn.k_proj.weight[5:].zero_()
    assert phaselens.load(model).info.rotations == (RotatedPairs(halves(8), 8),) * 2


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_reading_leaves_the_model_unchanged(rope_type):
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    fields = YARN | factors if rope_type == "longrope" else {"factor": 4.0}
    model = made("llama", rope_parameters=rope(rope_type, **fields))
    lens = phaselens.load(model, check=False)
    tokens = torch.arange(2, 14)[None]
    rotary = lens.original_model.model.rotary_emb
    with torch.no_grad():
        clean = lens(tokens)
    buffers = {name: value.clone() for name, value in rotary.named_buffers()}
    attributes = {name: value for name, value in vars(rotary).items() if not name.startswith("_")}
    read_rotated_pairs(lens, lens.info.positions)
    buffers_now = dict(rotary.named_buffers())
    assert buffers.keys() == buffers_now.keys()
    assert all(torch.equal(value, buffers_now[name]) for name, value in buffers.items())
    assert attributes == {name: value for name, value in vars(rotary).items() if not name.startswith("_")}
    with torch.no_grad():
        assert torch.equal(lens(tokens), clean)
    assert not any(attention.nulled for attention in (block.attn for block in lens.blocks))


@pytest.mark.parametrize("basis", [True, False])
def test_the_pairs_of_a_planted_matrix_are_found(basis):
    """Any pairing of dimensions, some of them left alone, with a factor on all rotated ones."""
    pairs = ((0, 5), (1, 3), (4, 7))
    generator = torch.Generator().manual_seed(1)
    vectors = torch.eye(8, dtype=torch.float64)
    if not basis:
        vectors = torch.randn(12, 8, generator=generator, dtype=torch.float64)
    rotated = [vectors]
    for position in (3.0, 50.0):
        turned = vectors.clone()
        for index, (low, high) in enumerate(pairs):
            angle = torch.tensor(position * 10.0 ** -(2 * index))
            turned[:, low] = angle.cos() * vectors[:, low] - angle.sin() * vectors[:, high]
            turned[:, high] = angle.sin() * vectors[:, low] + angle.cos() * vectors[:, high]
        rotated.append(turned)
    states = torch.stack(rotated)
    states[..., [0, 5, 1, 3, 4, 7]] *= 1.3
    rotation = pairs_of(states, torch.float64)
    assert rotation == RotatedPairs(pairs, 8)
    assert rotation.unrotated == (2, 6)
    assert str(rotation) == "6 of 8 dimensions, 0 with 5, 1 with 3, 4 with 7"


def test_a_map_that_does_not_rotate_pairs_is_reported_as_a_problem():
    vectors = torch.eye(4, dtype=torch.float64)
    mixing = torch.full((4, 4), 0.5, dtype=torch.float64)
    assert pairs_of(torch.stack([vectors, vectors @ mixing]), torch.float64).problem == (
        "the rotation mixes more than pairs of dimensions"
    )
    incomplete = torch.stack([vectors[:3], vectors[:3]])
    assert "do not reach every dimension" in str(pairs_of(incomplete, torch.float64))
    assert "not finite" in str(pairs_of(incomplete * torch.nan, torch.float64))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["llama", "a part of the head", "cohere", "a very large base", "yarn", "llama3", "dynamic"]
)
def test_angles_are_the_frequencies_of_the_models_rotary_module(name):
    model = CASES[name][0]()
    frequencies = next(value for key, value in model.named_buffers() if key.endswith("inv_freq")).tolist()
    rotation = phaselens.load(model, check=False).info.rotations[0]
    assert rotation.angles == pytest.approx(frequencies, rel=1e-5)
    attention_factor = 0.1 * math.log(4.0) + 1.0
    assert rotation.factor == pytest.approx(attention_factor if name == "yarn" else 1.0)


@pytest.mark.slow
def test_a_model_without_rotation_keeps_the_angles_of_its_base():
    nulled = phaselens.load(tiny_model("llama"), positions="nope").info.rotations[0]
    dropped = phaselens.load(tiny_model("llama-drope-nope")).info.rotations[0]
    assert nulled.angles == pytest.approx(dropped.angles)
    assert dropped.angles == pytest.approx([1.0, 0.1, 0.01, 0.001])
    assert (nulled.factor, dropped.factor) == (1.0, 1.0)


def test_layers_with_other_frequencies_have_other_angles():
    local, full = phaselens.load(tiny_model("gemma3")).info.rotations
    assert local == full
    assert local.angles[1] == pytest.approx(0.1)
    assert full.angles[1] == pytest.approx(1e6**-0.25)
