"""Traps of what heads write: subtraction where the sink has all attention, and values that W_O turns off."""

from __future__ import annotations

import torch
from tools.traps.writes import TRAPS, subtracted_script

from phaselens.attention import attend_without
from tests.traps.benches import assert_told_apart, tiny_bench


def test_a_sink_with_all_attention_leaves_nothing_to_divide_by() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 12, 8, generator=generator)
    for strength, is_lost in ((12.0, False), (60.0, True)):
        k[..., 0, :], q[..., :] = strength, q / q.sum(-1, keepdim=True)
        exact = (q.double()[..., 1:, :] @ k.double()[..., 1:, :].transpose(-1, -2)).masked_fill(
            ~torch.ones(11, 11, dtype=torch.bool).tril(), -torch.inf
        ).softmax(-1) @ v.double()[..., 1:, :]
        ours = attend_without(q, k, v, torch.tensor([[0]]), scale=1.0).out[..., 1:, :]
        torch.testing.assert_close(ours.double(), exact, atol=1e-5, rtol=0)
        error = (subtracted_script(q, k, v, 1.0)[..., 1:, :] - exact).norm(dim=-1) / exact.norm(dim=-1)
        assert not float(error.max()) < 1e-3
        assert bool(error.isnan().any()) is is_lost


def test_a_projection_without_the_value_writes_nothing() -> None:
    bench = tiny_bench("llama-gqa")
    (trap,) = [trap for trap in TRAPS if trap.name == "A value's norm before W_O"]
    assert_told_apart(trap, trap.measure(bench), 0.01)
