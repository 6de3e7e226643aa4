"""Norms of the writes of heads against float64."""

from __future__ import annotations

import torch

from phaselens.attention import head_norms, triangular


def test_norms_from_the_triangular_factor_equal_float64() -> None:
    torch.manual_seed(0)
    for d_head, d_model in ((4, 16), (16, 4)):
        w_o, z = torch.randn(3, d_head, d_model), torch.randn(9, 3, d_head)
        expected = torch.einsum("phd,hdm->phm", z.double(), w_o.double()).norm(dim=-1)
        assert torch.allclose(head_norms(z, triangular(w_o)), expected, rtol=1e-5)
