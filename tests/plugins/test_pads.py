"""Pads hold anything, NaN too, and a text may be all pads: nothing of them shows in a number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from phaselens.plugin import plugins
from tests.plugins.views import info, view

N_HEADS, D_HEAD, N_POS = 2, 4, 6
FIRST_VALUE = {
    "attention-patterns": "entropy",
    "bos-norm": "bos_ratio",
    "bos-write": "write",
    "compression": "entropy",
    "layer-balance": "share",
    "massive-activations": "ratio",
    "massive-values": "count_global",
}


def activations(n_texts: int) -> dict[str, Tensor]:
    """Random tensors of every hook point that a metric may ask for, attention among them."""
    from phaselens.attention import attend, summarise

    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(n_texts, N_POS, *shape, generator=generator)

    wide = N_HEADS * D_HEAD
    made = {
        name: random(wide) for name in ("hook_resid_pre", "hook_resid_post", "hook_attn_out", "hook_mlp_out")
    }
    made["attn.hook_out"] = made["hook_attn_out"]
    made |= {f"attn.hook_{name}": random(N_HEADS, D_HEAD) for name in ("q", "k", "v", "z")}
    made |= {"attn.hook_rot_q": made["attn.hook_q"], "attn.hook_rot_k": made["attn.hook_k"]}
    q, k = (made[f"attn.hook_{name}"].transpose(1, 2) for name in "qk")
    _, lse = attend(q, k, k, scale=1.0)
    found = summarise(q, k, lse, scale=1.0, position=0, entropy=True)
    assert found.sink is not None
    assert found.entropy is not None
    return made | {"attn.hook_lse": lse, "attn.hook_sink": found.sink, "attn.hook_entropy": found.entropy}


def measured(
    name: str, made: dict[str, Tensor], lengths: tuple[int, ...]
) -> tuple[list[dict[str, Any]], list[str]]:
    from phaselens.attention import distance_mass, received_mass

    q, k = (made[f"attn.hook_{each}"].transpose(1, 2) for each in "qk")
    given = q, k, made["attn.hook_lse"]
    summed = {
        "attn.hook_received": received_mass(*given, lengths=torch.tensor(lengths), scale=1.0),
        "attn.hook_distance": distance_mass(*given, longest=64, lengths=torch.tensor(lengths), scale=1.0),
    }
    metric = plugins().metric(name)(info(n_heads=N_HEADS, d_head=D_HEAD), plugins().metric(name).Params())
    w_o = torch.randn(N_HEADS, D_HEAD, N_HEADS * D_HEAD, generator=torch.Generator().manual_seed(1))
    metric.update(view(made | summed, lengths, weight=w_o))
    return metric.compute()["texts"].records(), metric.warnings


@pytest.mark.parametrize("name", FIRST_VALUE)
def test_pads_do_not_matter(name: str) -> None:
    lengths = (0, 4, 1, N_POS)
    clean = activations(4)
    records, warnings = measured(name, clean, lengths)
    value = FIRST_VALUE[name]
    null = {record["text"] for record in records if record[value] is None}
    # One token has a share of attention against MLP, a largest coordinate and cells; it has no rows to compare.
    alone = {"layer-balance", "massive-activations", "massive-values"}
    assert null == ({"a"} if name in alone else {"a", "c"})
    assert any("fewer than two tokens" in warning for warning in warnings)

    poisoned = {key: tensor.clone() for key, tensor in clean.items()}
    for key, tensor in poisoned.items():
        by_head = key in ("attn.hook_lse", "attn.hook_sink", "attn.hook_entropy")
        for row, length in enumerate(lengths):
            (tensor[row, :, length:] if by_head else tensor[row, length:]).fill_(torch.nan)
    # Sums over queries are made by the lens, which leaves pads' queries out.
    dirty, _ = measured(name, poisoned | {f"attn.hook_{one}": clean[f"attn.hook_{one}"] for one in ("q", "k")}
                        | {"attn.hook_lse": clean["attn.hook_lse"]}, lengths)  # fmt: skip
    assert dirty == records
