"""Every family is compared with its own eager attention in float64."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import phaselens
from phaselens.lens.checks import capture
from phaselens.lens.points import STATISTICS
from phaselens.testing import FAMILIES, tiny_model
from tests.lens.conftest import LENGTH, by_distance, dense, lens_of, text

CAPPED = {"gemma2", "gpt-oss"}  # attention that SDPA cannot compute

# One of each kind of attention for the quick tier; all of them in the whole suite.
QUICK = {"llama-gqa", "gemma2", "gpt2", "gpt-oss", "llama-drope-qk-norm-nope"}
EVERY_FAMILY = [
    family if family in QUICK else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES
]


def streamed(lens, tokens, **options):
    points = {
        (layer, name): f"blocks.{layer}.attn.{name}"
        for layer in range(lens.info.n_layers)
        for name in STATISTICS
    }
    return capture(lens, tokens, points, **options)


@pytest.mark.slow
@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_statistics_equal_the_float64_eager_attention(family):
    lens, reference = lens_of(family), dense(family)
    _, statistics = streamed(lens, text())
    for layer, pattern in enumerate(reference.patterns):
        expected = {
            "hook_sink": pattern[..., 0],
            "hook_itself": pattern.diagonal(dim1=-2, dim2=-1),
            "hook_entropy": torch.special.entr(pattern).sum(-1),
            "hook_received": pattern.sum(-2),
            "hook_distance": by_distance(pattern, 64),
        }
        for name, value in expected.items():
            assert statistics[layer, name].dtype == torch.float32
            torch.testing.assert_close(
                statistics[layer, name].double(), value, atol=1e-5, rtol=0, msg=f"{layer} {name}"
            )


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_statistics_equal_those_of_float64_scores(family):
    """The scores are those of rotated q and k in float64, with a float64 softmax (transformers' own is float32)."""
    wide = phaselens.load(tiny_model(family, dtype=torch.float64), label=family)
    reference = dense(family)
    names = {
        (layer, p): f"blocks.{layer}.attn.{p}" for layer in range(2) for p in ("hook_rot_q", "hook_rot_k")
    }
    _, qk = capture(wide, text(), names)
    _, statistics = streamed(lens_of(family), text())
    for layer, pattern in enumerate(reference.patterns):
        q, k = (qk[layer, point].transpose(1, 2) for point in ("hook_rot_q", "hook_rot_k"))
        scores = (
            q
            @ k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).transpose(-1, -2)
            * wide.info.scales[layer]
        )
        if wide.info.softcap is not None:
            scores = torch.tanh(scores / wide.info.softcap) * wide.info.softcap
        position = torch.arange(LENGTH)
        distance = position[:, None] - position[None, :]
        visible = (distance >= 0) & (distance < (wide.info.windows[layer] or LENGTH))
        assert not (pattern > 0)[:, :, ~visible].any()
        lse = scores.masked_fill(~visible, -torch.inf).logsumexp(-1)
        sink_logits = getattr(wide.blocks[layer].attn.original_component, "sinks", None)
        if sink_logits is not None:
            lse = torch.logaddexp(lse, sink_logits.double()[None, :, None])
        exact = (scores - lse[..., None]).exp().masked_fill(~visible, 0.0)
        expected = {"hook_sink": exact[..., 0], "hook_entropy": torch.special.entr(exact).sum(-1)}
        expected["hook_itself"] = exact.diagonal(dim1=-2, dim2=-1)
        expected |= {"hook_received": exact.sum(-2), "hook_distance": by_distance(exact, 64)}
        torch.testing.assert_close(statistics[layer, "hook_lse"].double(), lse, atol=1e-5, rtol=1e-5)
        for name, value in expected.items():
            torch.testing.assert_close(
                statistics[layer, name].double(), value, atol=1e-5, rtol=0, msg=f"{layer} {name}"
            )


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_logits_are_the_models_own(family):
    lens = lens_of(family)
    model = tiny_model(family)
    model.set_attn_implementation("eager" if family in CAPPED else "sdpa")
    with torch.no_grad():
        expected = model(text()).logits
        logits = lens(text())
    if family in CAPPED:
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)
    else:
        assert torch.equal(logits, expected), f"largest difference {(logits - expected).abs().max():.3g}"
    scale = dense(family).logits.abs().max()
    assert (logits.double() - dense(family).logits).abs().max() <= 2e-5 * scale


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_measuring_changes_no_logit_beyond_rounding(family):
    lens = lens_of(family)
    with torch.no_grad():
        expected = lens(text())
    logits, _ = streamed(lens, text(), unembed=True)
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_the_full_check_passes(family):
    from phaselens.lens import run_checks

    failed = [result for result in run_checks(lens_of(family)) if not result.ok]
    assert not failed


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt-neox", "phi3", "gemma3", "smollm3"])
def test_nulling_equals_replacing_the_rotation_in_the_model(family):
    model = tiny_model(family)
    for name, module in model.named_modules():
        if name.endswith("rotary_emb"):
            module.register_forward_hook(
                lambda _m, _a, cos_sin: (torch.ones_like(cos_sin[0]), torch.zeros_like(cos_sin[1]))
            )
    lens = phaselens.load(tiny_model(family), positions="nope")
    assert set(lens.info.positions) == {"nope"}
    with torch.no_grad():
        assert torch.equal(lens(text()), model(text()).logits)
    _, points = capture(lens, text(), {p: f"blocks.0.attn.{p}" for p in ("hook_q", "hook_rot_q")})
    if family not in ("qwen3", "gemma3"):  # these norm the query in between
        assert torch.equal(points["hook_q"], points["hook_rot_q"])


def test_nulling_learned_positions_is_refused_by_name():
    with pytest.raises(phaselens.RefusedModel, match=r"gpt2: positions=nope .* layer 0 has 'learned'"):
        phaselens.load(tiny_model("gpt2"), positions="nope")


@pytest.mark.parametrize(
    ("model_type", "shape", "reason"),
    [
        ("xlm", {"n_heads": 2, "n_layers": 1, "emb_dim": 16, "causal": True}, "in a list of their own"),
        ("t5", {"num_layers": 1, "num_heads": 2, "d_model": 16, "d_ff": 16, "d_kv": 8}, "causal"),
    ],
)
def test_a_family_that_is_not_served_is_refused_by_name(model_type, shape, reason):
    config = AutoConfig.for_model(model_type, hidden_size=16, vocab_size=11, intermediate_size=16, **shape)
    if model_type == "t5":
        from transformers import T5ForConditionalGeneration

        model = T5ForConditionalGeneration(config)
    else:
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(phaselens.RefusedModel, match=reason) as refused:
        phaselens.load(model)
    assert model_type.split("_")[0] in str(refused.value).lower()
    assert "\n" not in str(refused.value)
