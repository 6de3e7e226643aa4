"""What `phaselens hooks` lists is there, has the shape it says, and nothing said to exist is missing."""

from __future__ import annotations

import pytest
import torch

from phaselens.lens.checks import capture
from phaselens.lens.points import describe_hooks
from tests.lens.conftest import lens_of

AXES = {
    "batch": 2,
    "pos": 24,
    "d_model": 32,
    "head": 4,
    "d_head": 8,
    "query": 24,
    "key": 24,
    "distance": 64,
    "1": 1,
}


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2", "phi3"])
def test_each_listed_point_has_the_shape_it_says(family, tokens):
    lens = lens_of(family)
    axes = {**AXES, "kv_head": lens.info.n_kv_heads, "d_rotary": lens.info.d_head}
    for point in describe_hooks(lens):
        name = point.name.replace("{0..1}", "1")
        _, kept = capture(lens, tokens, {"value": name})
        expected = [axes[axis.strip()] for axis in point.shape.strip("[]").split(",")]
        assert list(kept["value"].shape) == expected, point.name
        assert str(kept["value"].dtype) == f"torch.{point.dtype}"
        assert point.meaning


def test_the_promised_points_are_listed():
    names = {point.name for point in describe_hooks(lens_of("llama-gqa"))}
    inside = (
        "q",
        "k",
        "v",
        "rot_q",
        "rot_k",
        "z",
        "pattern",
        "attn_scores",
        "lse",
        "sink",
        "entropy",
        "received",
    )
    promised = {f"blocks.{{0..1}}.attn.hook_{name}" for name in inside}
    promised |= {
        f"blocks.{{0..1}}.hook_{n}" for n in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
    }
    assert promised | {"hook_embed", "ln_final.hook_normalized"} <= names


def test_mixed_layers_are_listed_apart():
    """SmolLM3's second layer has no rotation; Cohere 2 has no mid residual."""
    names = [point.name for point in describe_hooks(lens_of("cohere2"))]
    assert not any("resid_mid" in name for name in names)
    assert lens_of("smollm3").info.positions == ("rope", "nope")
    assert lens_of("smollm3").info.positions_summary == "rope 1, nope 1"


def test_all_points_can_be_listed():
    lens = lens_of("llama-gqa")
    every = {point.name for point in describe_hooks(lens, every=True)}
    assert "blocks.{0..1}.mlp.hook_in" in every
    assert len(every) > len(describe_hooks(lens))


def test_a_rotary_model_and_its_nulled_layer():
    """One layer's rotation can be nulled and restored while the others keep theirs."""
    import phaselens
    from phaselens.lens.positions import detect, null_rotation, restore_rotation
    from phaselens.testing import tiny_model

    lens = phaselens.load(tiny_model("llama"))
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        before = lens(tokens)
        null_rotation(lens, [1])
        assert detect(lens) == ("rope", "nope")
        assert not torch.equal(lens(tokens), before)
        restore_rotation(lens)
        assert torch.equal(lens(tokens), before)
