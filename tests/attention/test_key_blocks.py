"""Statistics of every option of the softmax in blocks of any size, against dense float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from phaselens import attention
from phaselens.attention import _key_blocks
from phaselens.attention._problem import Problem
from tests.attention.reference import DenseAttention, dense, largest_difference, random_qkv

BATCH, HEADS, N_QUERIES, N_KEYS = 2, 4, 11, 13


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def visible(*shape: int) -> Tensor:
    """A mask that leaves most cells, hides all from query 3 and key 5 from all."""
    mask = draw(*shape, seed=7) > -0.6
    mask[:, :, 3], mask[..., 5] = False, False
    return mask


OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {},
    "window": {"window": 4},
    "cap": {"softcap": 1.5},
    "sink logits": {"sink_logits": draw(HEADS, seed=1)},
    "mask": {"mask": visible(1, 1, N_QUERIES, N_KEYS)},
    "mask by text": {"mask": visible(BATCH, 1, N_QUERIES, N_KEYS)},
    "mask by head and a window": {"mask": visible(1, HEADS, N_QUERIES, N_KEYS), "window": 6},
    "additive mask": {
        "mask": draw(BATCH, HEADS, N_QUERIES, N_KEYS).masked_fill(
            ~visible(BATCH, HEADS, N_QUERIES, N_KEYS), -torch.inf
        )
    },
    "additive mask without biases": {
        "mask": torch.zeros(1, HEADS, N_QUERIES, N_KEYS).masked_fill(
            ~visible(1, HEADS, N_QUERIES, N_KEYS), torch.finfo(torch.float32).min
        )
    },
    "bias by key": {"bias": 5 * draw(1, HEADS, 1, N_KEYS)},
    "bias by query and text, and a window": {"bias": 5 * draw(BATCH, 1, N_QUERIES, N_KEYS), "window": 5},
    "bias, mask and sink logits": {
        "bias": 5 * draw(BATCH, HEADS, 1, N_KEYS),
        "mask": draw(BATCH, 1, N_QUERIES, N_KEYS, seed=2).masked_fill(
            ~visible(BATCH, 1, N_QUERIES, N_KEYS), -torch.inf
        ),
        "sink_logits": draw(HEADS, seed=3),
    },
    "hidden keys": {"hidden_keys": torch.tensor([[0, 4]])},
    "hidden keys by text": {"hidden_keys": torch.tensor([[1, -1], [7, 12]]), "window": 5},
    "hidden keys and a mask": {
        "hidden_keys": torch.tensor([[1], [7]]),
        "mask": visible(BATCH, 1, N_QUERIES, N_KEYS),
    },
}


def reference(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> DenseAttention:
    """The dense attention; hidden keys are hidden by a mask."""
    options = dict(options)
    hidden_keys = options.pop("hidden_keys", None)
    if hidden_keys is not None:
        mask = options.get("mask", torch.ones(1, 1, N_QUERIES, N_KEYS, dtype=torch.bool).tril(2))
        mask = mask.expand(BATCH, *mask.shape[1:]).clone()
        for text, keys in enumerate(hidden_keys.expand(BATCH, -1).tolist()):
            mask[text, :, :, [key for key in keys if key >= 0]] = False
        options["mask"] = mask
    return dense(q, k, v, **options)


def assert_equals_dense(q: Tensor, k: Tensor, v: Tensor, tolerance: float, **options: Any) -> None:
    """Compare everything that one pass computes, with some pads on the right of the second text."""
    expected = reference(q, k, v, options)
    offset = N_KEYS - N_QUERIES
    out, lse = attention.attend(q, k, v, **options)
    scale = float(expected.lse.masked_fill(expected.lse == -torch.inf, 0).abs().max().clamp(min=1))
    assert (
        largest_difference(
            lse.masked_fill(lse == -torch.inf, 0) / scale,
            expected.lse.masked_fill(expected.lse == -torch.inf, 0) / scale,
        )
        < tolerance
    )
    labels = torch.arange(N_KEYS).remainder(3)[None] + torch.tensor([[-1], [0]])
    lengths = torch.tensor([N_KEYS, 9])
    real = (torch.arange(N_QUERIES) + offset < lengths[:, None])[:, None, :, None]
    summary = attention.summarise(
        q, k, lse, position=4, itself=True, entropy=True, received=True, distances=N_KEYS, segments=labels,
        top=True, largest=True, refine=True, lengths=lengths, **options,
    )  # fmt: skip
    pattern = expected.pattern
    query, key = torch.arange(N_QUERIES)[:, None] + offset, torch.arange(N_KEYS)
    counted = pattern * real
    products = (
        q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2)
    ).abs()
    is_visible = expected.scores > -torch.inf
    sees_nothing = ~is_visible.any(-1)
    statistics = {
        "sink": pattern[..., 4],
        "itself": pattern.diagonal(offset, -2, -1),
        "entropy": expected.entropy,
        "received": counted.sum(-2),
        "distance": torch.stack([(counted * (query - key == d)).sum((-2, -1)) for d in range(N_KEYS)], -1),
        "segments": torch.stack(
            [(pattern * (labels == segment)[:, None, None]).sum(-1) for segment in range(3)], -1
        ),
        "largest": products.masked_fill(~is_visible, -1.0).amax(-1).masked_fill(sees_nothing, torch.nan),
    }
    for name, value in statistics.items():
        size = float(value.nan_to_num().abs().max().clamp(min=1))
        difference = largest_difference(getattr(summary, name) / size, value / size)
        assert difference < tolerance, (name, difference)
    assert (
        largest_difference(
            (summary.lse / scale).masked_fill(sees_nothing, 0),
            (expected.lse / scale).masked_fill(sees_nothing, 0),
        )
        < tolerance
    )
    top = summary.top
    assert torch.equal(top[..., 0].isnan(), sees_nothing)
    weight = pattern.gather(-1, top[..., :1].nan_to_num().long())[..., 0]
    assert largest_difference(weight, pattern.amax(-1)) < 2 * tolerance
    near = attention.distance_mass(q, k, lse, longest=4, lengths=lengths, **options)
    assert largest_difference(near, statistics["distance"][..., :4]) < N_QUERIES * tolerance
    for include_self, exclude_first in ((False, True), (True, False)):
        in_window = (key >= query - 3) & (key < query + int(include_self)) & (key >= int(exclude_first))
        mass = attention.window_mass(
            q, k, lse, 3, include_self=include_self, exclude_first=exclude_first, **options
        )
        assert largest_difference(mass, (pattern * in_window).sum(-1)) < tolerance
    blocks_out, _ = _key_blocks.attend(Problem(q, k, **options), v)
    if "sink_logits" not in options:
        assert largest_difference(blocks_out, expected.out) < 10 * tolerance
        assert largest_difference(out, expected.out) < 10 * tolerance


@pytest.mark.parametrize(("n_rows", "n_elements"), [(128, 1 << 20), (3, 1), (4, 400)])
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("name", OPTIONS)
def test_blocks_of_any_size_equal_dense(
    monkeypatch: pytest.MonkeyPatch, n_rows: int, n_elements: int, kv_heads: int, name: str
) -> None:
    monkeypatch.setattr(_key_blocks, "ROWS", n_rows)
    monkeypatch.setattr(_key_blocks, "CPU_ELEMENTS", n_elements)
    q, k, v = random_qkv(
        N_QUERIES, N_KEYS, kv_heads=kv_heads, group=HEADS // kv_heads, d_v=5, dtype=torch.float64
    )
    assert_equals_dense(q, k, v, 1e-11, scale=0.8, **OPTIONS[name])


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("name", OPTIONS)
def test_heads_that_need_float64_equal_dense_beside_those_that_do_not(kv_heads: int, name: str) -> None:
    q, k, v = random_qkv(N_QUERIES, N_KEYS, kv_heads=kv_heads, group=HEADS // kv_heads, d_v=5)
    q[0, 1] *= 3000.0
    q[1, 2:] *= 4000.0
    options = {
        option: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
        for option, value in OPTIONS[name].items()
    }
    expected = reference(q, k, v, {"scale": 0.8, **options})
    _, lse = attention.attend(q, k, v, scale=0.8, **options)
    labels = torch.arange(N_KEYS).remainder(3)[None] + torch.tensor([[-1], [0]])
    summary = attention.summarise(
        q, k, lse, position=4, itself=True, entropy=True, received=True, segments=labels, refine=True,
        lengths=torch.tensor([N_KEYS, 9]), scale=0.8, **options,
    )  # fmt: skip
    pattern = expected.pattern
    real = (torch.arange(N_QUERIES) + 2 < torch.tensor([[N_KEYS], [9]]))[:, None, :, None]
    for statistic, value in {
        "sink": pattern[..., 4],
        "itself": pattern.diagonal(2, -2, -1),
        "entropy": expected.entropy,
        "received": (pattern * real).sum(-2),
        "segments": torch.stack([(pattern * (labels == n)[:, None, None]).sum(-1) for n in range(3)], -1),
    }.items():
        assert largest_difference(getattr(summary, statistic), value) < 1e-5, statistic
    is_finite = expected.lse > -torch.inf
    torch.testing.assert_close(summary.lse[is_finite].double(), expected.lse[is_finite], rtol=1e-6, atol=1e-5)
    assert torch.equal(summary.lse == -torch.inf, ~is_finite)


@pytest.mark.parametrize(("n_rows", "n_elements"), [(128, 1 << 20), (4, 1), (4, 30), (2, 200), (50, 100)])
@pytest.mark.parametrize("kv_heads", [1, 3])
def test_blocks_cover_each_row_once_and_stay_small(
    monkeypatch: pytest.MonkeyPatch, n_rows: int, n_elements: int, kv_heads: int
) -> None:
    """All of a row's visible keys are in its block; a block has at most 4 times the elements, or one row of a head."""
    monkeypatch.setattr(_key_blocks, "ROWS", n_rows)
    monkeypatch.setattr(_key_blocks, "CPU_ELEMENTS", n_elements)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    q, k, _ = random_qkv(9, 12, batch=3, kv_heads=kv_heads, group=2)
    counts = torch.zeros(q.shape[:3])
    for block in _key_blocks.key_blocks(Problem(q, k, 1.0)):
        counts[block.row_index] += 1
        first, stop = block.rows
        assert block.cols == (0, stop + 3)
        assert block.p.shape == (
            block.batch.stop - block.batch.start, block.heads.stop - block.heads.start, stop - first, stop + 3
        )  # fmt: skip
        assert stop - first <= n_rows
        assert block.p.numel() <= max(4 * 2 * n_elements, 2 * 12)
        torch.testing.assert_close(block.p, block.log2_p.exp2())
        torch.testing.assert_close(block.p.sum(-1), block.total)
    assert (counts == 1).all()
