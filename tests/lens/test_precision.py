"""Half precision: the lens measures where eager attention overflows; nothing is computed without a hook on it."""

from __future__ import annotations

import pytest
import torch

import phaselens
from phaselens.lens.checks import capture
from phaselens.lens.points import STATISTICS
from phaselens.testing import tiny_model
from tests.lens.conftest import by_distance, text


def loud_model(dtype):
    """Return a DroPE model whose layer 1 has the norms of Llama-2-7B-DroPE's: near 1,100 a query head, 1,000 a key
    head."""
    model = tiny_model("llama-drope-nope", hidden_size=64, head_dim=16, gain=1.0)
    projected = {}
    attention = model.model.layers[1].self_attn
    handles = [
        getattr(attention, f"{p}_proj").register_forward_hook(
            lambda _m, _a, output, p=p: projected.update({p: output})
        )
        for p in "qk"
    ]
    with torch.no_grad():
        model(text())
        for tensor, norm in (("q", 1100.0), ("k", 1000.0)):
            mean_norm = projected[tensor].unflatten(-1, (-1, 16)).norm(dim=-1).mean()
            getattr(attention, f"{tensor}_proj").weight.mul_(norm / mean_norm)
    for handle in handles:
        handle.remove()
    return model.to(dtype)


def test_scores_near_a_million_are_measured_in_fp16_where_eager_gives_nan():
    eager = loud_model(torch.float16)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        assert eager(text()).logits.isnan().any()

    lens = phaselens.load(loud_model(torch.float16))
    names = {name: f"blocks.1.attn.{name}" for name in (*STATISTICS, "hook_rot_q", "hook_rot_k")}
    final, activations = capture(lens, text(), names)
    assert final.isfinite().all()

    # The truth of these very fp16 queries and keys, in float64.
    q, k = (activations[name].double().transpose(1, 2) for name in ("hook_rot_q", "hook_rot_k"))
    scores = q @ k.repeat_interleave(2, dim=1).transpose(-1, -2) * lens.info.scales[1]
    assert scores.abs().max() > 65504
    hidden = torch.ones(24, 24, dtype=torch.bool).triu(1)
    scores = scores.masked_fill(hidden, -torch.inf)
    pattern = scores.softmax(-1)
    torch.testing.assert_close(activations["hook_sink"].double(), pattern[..., 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(
        activations["hook_itself"].double(), pattern.diagonal(dim1=-2, dim2=-1), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        activations["hook_entropy"].double(), torch.special.entr(pattern).sum(-1), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(activations["hook_received"].double(), pattern.sum(-2), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        activations["hook_distance"].double(), by_distance(pattern, 64), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(activations["hook_lse"].double(), scores.logsumexp(-1), atol=0, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_are_served_with_float32_statistics(dtype):
    lens = phaselens.load(tiny_model("llama-gqa", dtype=dtype))
    _, statistics = capture(lens, text(), {name: f"blocks.1.attn.{name}" for name in STATISTICS})
    assert all(value.dtype == torch.float32 for value in statistics.values())
    assert all(value.isfinite().all() for value in statistics.values())


def test_the_unembedding_is_computed_only_on_request():
    lens = phaselens.load(tiny_model("llama"))
    called = []
    lens.original_model.lm_head.register_forward_hook(lambda *_: called.append(1))
    lens.stream(text())
    assert called == []
    lens.stream(text(), unembed=True)
    assert called == [1]


def test_statistics_are_computed_only_where_hooked(monkeypatch):
    from phaselens import attention

    calls = []
    for name in ("attend", "summarise", "refine_lse"):
        true = getattr(attention, name)
        monkeypatch.setattr(attention, name, lambda *a, n=name, f=true, **k: calls.append(n) or f(*a, **k))
    lens = phaselens.load(tiny_model("llama"), check=False)
    calls.clear()
    lens.stream(text())
    assert calls == []
    lens.stream(text(), [("blocks.1.attn.hook_sink", lambda v, hook: None)])
    assert calls == ["attend", "summarise"]
