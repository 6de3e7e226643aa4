"""Whatever pads hold, NaN included, has no effect on a number; a text may consist of pads only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from phaselens.plugin import plugins
from tests.plugins.views import info, view

N_HEADS, D_HEAD, N_POS = 2, 4, 6
NULLABLE_COLUMNS = {
    "attention-patterns": "entropy",
    "bos-norm": "bos_ratio",
    "bos-write": "write",
    "compression": "entropy",
    "layer-balance": "share",
    "massive-activations": "ratio",
    "massive-values": "count_global",
}


def activations(n_texts: int) -> dict[str, Tensor]:
    """Return random tensors for every hook point that a metric reads, and the attention statistics that follow."""
    from phaselens.attention import attend, summarise

    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(n_texts, N_POS, *shape, generator=generator)

    d_model = N_HEADS * D_HEAD
    tensors = {
        name: random(d_model)
        for name in ("hook_resid_pre", "hook_resid_post", "hook_attn_out", "hook_mlp_out")
    }
    tensors["attn.hook_out"] = tensors["hook_attn_out"]
    tensors |= {f"attn.hook_{name}": random(N_HEADS, D_HEAD) for name in ("q", "k", "v", "z")}
    tensors["attn.hook_attended"] = tensors["attn.hook_z"]
    tensors |= {"attn.hook_rot_q": tensors["attn.hook_q"], "attn.hook_rot_k": tensors["attn.hook_k"]}
    q, k = (tensors[f"attn.hook_{name}"].transpose(1, 2) for name in "qk")
    _, lse = attend(q, k, k, scale=1.0)
    statistics = summarise(q, k, lse, scale=1.0, position=0, entropy=True)
    assert statistics.sink is not None
    assert statistics.entropy is not None
    return tensors | {
        "attn.hook_lse": lse,
        "attn.hook_sink": statistics.sink,
        "attn.hook_entropy": statistics.entropy,
    }


def text_records(
    name: str, tensors: dict[str, Tensor], lengths: tuple[int, ...]
) -> tuple[list[dict[str, Any]], list[str]]:
    from phaselens.attention import distance_mass, received_mass

    q, k = (tensors[f"attn.hook_{query_or_key}"].transpose(1, 2) for query_or_key in "qk")
    attention = q, k, tensors["attn.hook_lse"]
    sums = {
        "attn.hook_received": received_mass(*attention, lengths=torch.tensor(lengths), scale=1.0),
        "attn.hook_distance": distance_mass(*attention, longest=64, lengths=torch.tensor(lengths), scale=1.0),
    }
    metric = plugins().metric(name)(info(n_heads=N_HEADS, d_head=D_HEAD), plugins().metric(name).Params())
    w_o = torch.randn(N_HEADS, D_HEAD, N_HEADS * D_HEAD, generator=torch.Generator().manual_seed(1))
    metric.update(view(tensors | sums, lengths, weight=w_o))
    return metric.compute()["texts"].records(), metric.warnings


@pytest.mark.parametrize("name", NULLABLE_COLUMNS)
def test_pads_have_no_effect(name: str) -> None:
    lengths = (0, 4, 1, N_POS)
    tensors = activations(4)
    records, warnings = text_records(name, tensors, lengths)
    column = NULLABLE_COLUMNS[name]
    null_texts = {record["text"] for record in records if record[column] is None}
    # One token has an attention share, a largest coordinate and cells, but no rows to compare.
    defined_for_one_token = {"layer-balance", "massive-activations", "massive-values"}
    assert null_texts == ({"a"} if name in defined_for_one_token else {"a", "c"})
    assert any("fewer than two tokens" in warning for warning in warnings)

    poisoned = {key: tensor.clone() for key, tensor in tensors.items()}
    for key, tensor in poisoned.items():
        by_head = key in ("attn.hook_lse", "attn.hook_sink", "attn.hook_entropy")
        for row, length in enumerate(lengths):
            (tensor[row, :, length:] if by_head else tensor[row, length:]).fill_(torch.nan)
    # The lens sums over queries and leaves those of pads out, so the inputs of these sums stay as they are.
    summed = {point: tensors[point] for point in ("attn.hook_q", "attn.hook_k", "attn.hook_lse")}
    poisoned_records, _ = text_records(name, poisoned | summed, lengths)
    assert poisoned_records == records
