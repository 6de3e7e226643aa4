"""Traps of libraries on tiny models of other families, and the gradient that a fused kernel does not have."""

from __future__ import annotations

import pytest
import torch
from tools.traps.libraries import TRAPS

from phaselens.attention import attend
from tests.toys import letters
from tests.traps.benches import assert_told_apart, tiny_bench


@pytest.mark.slow
@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.name)
def test_ours_is_the_dense_number_on_a_model_with_grouped_keys(trap) -> None:
    bench = tiny_bench("llama-gqa", [letters(24)])
    assert_told_apart(trap, trap.measure(bench), 1e-3)


def test_the_fused_log_sum_exp_has_no_gradient_and_ours_refuses_to_be_asked_for_one() -> None:
    q = torch.randn(1, 1, 6, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q, 0.0, True, scale=1.0)
    scores = (q @ q.transpose(-1, -2)).masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(), -torch.inf)
    torch.testing.assert_close(fused[1].detach(), scores.logsumexp(-1).detach(), atol=1e-5, rtol=0)
    (exact,) = torch.autograd.grad(scores.logsumexp(-1).sum(), q)
    assert float(exact.abs().max()) > 0.1
    gradient = torch.autograd.grad((fused[0].sum() * 0 + fused[1].sum()), q, allow_unused=True)[0]
    assert gradient is None or not gradient.any()
    with pytest.raises(RuntimeError, match="gradient"):
        attend(q, q, q, scale=1.0)
