"""Traps of attention on planted numbers: overflow, NaN, clamps, entropies in float16, grouped keys, distances."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tools.traps.attention import (
    KEY_NORM,
    QUERY_NORM,
    TAU,
    TRAPS,
    clamped_script,
    distance_profile_script,
    half_precision_script,
    last_row_entropy_script,
    rate_of_nan_script,
    row_entropies,
    streamed_scores,
    with_query0_script,
)
from tools.traps.dense import softmax_attention
from torch import Tensor

from phaselens_plugins.sinks import SinkParams, Sinks
from tests.plugins.test_attention_patterns_goldens import CHECKS, FILES, matrix, metric_on
from tests.plugins.views import rows, view
from tests.toys import toy_info
from tests.traps.benches import assert_told_apart, tiny_bench


@pytest.fixture(scope="module")
def large_states() -> tuple[Tensor, Tensor]:
    """Random float16 queries and keys [layer, head, pos, d_head] with the norms of DroPE-Llama-2's layer 1."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 1, 2, 24, 128, generator=generator, dtype=torch.float64)
    states = states / states.norm(dim=-1, keepdim=True)
    # A shared direction, so that scores have one sign as the model's have.
    direction = states[:, :, :1, :1] * 2
    states = (states + direction) / (states + direction).norm(dim=-1, keepdim=True)
    return (states[0] * QUERY_NORM).half(), (states[0].flip(2) * KEY_NORM).half()


def test_large_scores_overflow_in_float16_and_not_in_ours(large_states: tuple[Tensor, Tensor]) -> None:
    q, k = large_states
    exact = softmax_attention(q.double(), k.double(), 128**-0.5)
    assert float((q.float() @ k.float().transpose(-1, -2)).max()) > 65504
    assert bool(half_precision_script(q, k, 128**-0.5).isnan().any(-1)[..., 1:].all())
    expected = exact[..., 1:, 0].mean(-1)
    torch.testing.assert_close(streamed_scores(q, k, 128**-0.5), expected, atol=1e-5, rtol=0)


def test_clamped_scores_tie_where_real_ones_do_not(large_states: tuple[Tensor, Tensor]) -> None:
    q, k = large_states
    clamped, exact = (
        clamped_script(q, k, 128**-0.5),
        softmax_attention(q.double(), k.double(), 128**-0.5),
    )
    n_ties = ((clamped == clamped.amax(-1, keepdim=True)).sum(-1) > 1).double().mean()
    assert n_ties > 0.9
    assert ((exact == exact.amax(-1, keepdim=True)).sum(-1) > 1).double().mean() < 0.05
    assert float((clamped[..., 1:, 0].mean(-1) - exact[..., 1:, 0].mean(-1)).abs().max()) > 0.02


def test_nan_is_no_sink_for_the_script_and_missing_for_the_metric() -> None:
    sink = torch.full((1, 2, 6), 0.9)
    sink[0, 1] = torch.nan
    assert rate_of_nan_script(sink[..., 1:].mean(-1)) == 0.5
    metric = Sinks(toy_info(n_layers=1), SinkParams(strongest=False))
    metric.update(view({"attn.hook_sink": sink}, (6,)))
    assert [row["score"] for row in rows(metric, "texts")] == [pytest.approx(0.9), None]
    assert rows(metric, "layers")[0]["sink_rate"] is None
    assert any("NaN or infinite" in note for note in metric.warnings)


def test_uniform_attention_is_a_sink_in_short_texts_for_the_script_alone() -> None:
    for length, is_sink in ((8, True), (9, True), (10, False), (64, False)):
        uniform = torch.ones(length, length, dtype=torch.float64).tril()
        uniform = uniform / uniform.sum(-1, keepdim=True)
        harmonic = sum(1 / n for n in range(1, length + 1))
        assert float(with_query0_script(uniform)) == pytest.approx(harmonic / length)
        assert bool(with_query0_script(uniform) >= TAU) is is_sink
        metric = Sinks(toy_info(n_layers=1, n_heads=1), SinkParams(strongest=False))
        metric.update(view({"attn.hook_sink": uniform[None, None, :, 0]}, (length,)))
        (row,) = rows(metric, "texts")
        assert row["score"] == pytest.approx((harmonic - 1) / (length - 1))
        assert row["null"] == pytest.approx(row["score"])
        assert row["score"] < TAU


def test_the_entropy_in_float16_is_that_of_the_last_row() -> None:
    scores = torch.randn(3, 12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pattern = softmax_attention(scores, torch.eye(12, dtype=torch.float64).expand(3, 12, 12), 1.0)
    last_row = row_entropies(pattern)[:, -1]
    torch.testing.assert_close(last_row_entropy_script(pattern).double(), last_row / 12, atol=1e-3, rtol=1e-2)
    assert float((row_entropies(pattern).mean(-1) / last_row_entropy_script(pattern)).min()) > 4


@pytest.mark.parametrize("name", FILES)
def test_the_script_gives_the_published_entropy_on_the_published_matrix(name: str) -> None:
    pattern, published = matrix(name), CHECKS[name]
    script = float(last_row_entropy_script(pattern).double().mean())
    assert script == pytest.approx(published["script_entropy_float16_replica"], rel=2e-3)
    mean_entropy = np.mean([row["entropy"] for row in rows(metric_on(pattern), "texts")])
    assert mean_entropy == pytest.approx(float(row_entropies(pattern).mean()), rel=5e-4)
    assert mean_entropy > 5 * script


def test_a_distance_without_pairs_keeps_what_the_memory_held() -> None:
    patterns = [torch.eye(n, dtype=torch.float64)[None, None] for n in (4, 6)]
    profile = distance_profile_script(patterns, 6, torch.full((6,), 1e305, dtype=torch.float64))
    assert profile.tolist() == [1.0, 0.0, 0.0, 0.0, 1e305, 1e305]


@pytest.mark.parametrize(
    ("name", "family", "least_error"),
    [
        ("Key heads in the wrong order", "llama-gqa", 0.01),
        pytest.param("Queries and keys before the rotation", "qwen3", 0.001, marks=pytest.mark.slow),
        pytest.param("No causal mask", "mistral", 0.01, marks=pytest.mark.slow),
    ],
)
def test_traps_on_models_of_other_families(name: str, family: str, least_error: float) -> None:
    (trap,) = [trap for trap in TRAPS if trap.name == name]
    bench = tiny_bench(family, sliding_window=None) if family == "mistral" else tiny_bench(family)
    assert_told_apart(trap, trap.measure(bench), least_error)


@pytest.mark.slow
def test_a_model_without_rotation_has_no_error_from_unrotated_queries() -> None:
    (trap,) = [trap for trap in TRAPS if trap.name == "Queries and keys before the rotation"]
    numbers = trap.measure(tiny_bench("llama-drope-nope"))
    assert numbers.script == pytest.approx(numbers.reference, abs=1e-12)
    assert not math.isnan(numbers.reference or np.nan)
