"""What the ablations share: positions that stay absolute in generation, and controls drawn by what a text says."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from phaselens.plugin import Condition, Edit, Site, plugins
from phaselens.runs import applied
from phaselens_plugins._causal import ZeroElsewhere, elsewhere, layers_in
from tests.plugins.ablations import TEXTS, row, rows, run
from tests.plugins.bos_models import SHRINKER, bos_lens
from tests.toys import toy_info, toy_lens

N_NEW = 5


@pytest.fixture(scope="module")
def lens() -> Any:
    return toy_lens("llama-gqa", dtype=torch.float64)


def conditions(lens: Any) -> dict[str, Condition]:
    """The conditions of all three metrics that edit position 0, in layer 1 of a model."""
    asked = {
        "bos-v": {"layer": 1, "seeds": 0},
        "layer-ablation": {"part": "bos_only", "layers": "1", "seeds": 0},
    }
    found = {}
    for name, params in asked.items():
        metric = plugins().metric(name)
        found[name] = metric(lens.info, metric.Params.parse(params)).conditions()[-1]
    edits = [Edit("blocks.1.hook_mlp_out", 0.0, positions=[0])]
    return {**found, "bos-mlp": Condition("write layer", edits, layer=1)}


def recomputed(lens: Any, condition: Condition, tokens: Tensor) -> Tensor:
    """Logits of the last position in one whole forward whose row 0 is zeroed by TransformerLens' hooks."""

    def zero_first(tensor: Tensor, hook: Any) -> Tensor:
        tensor = tensor.clone()
        tensor[:, 0] = 0.0
        return tensor

    with torch.no_grad():
        return lens.run_with_hooks(tokens, fwd_hooks=[(edit.point, zero_first) for edit in condition.edits])[
            :, -1
        ]


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", ["bos-mlp", "bos-v", "layer-ablation"])
def test_generating_edits_position_0_and_nothing_else(lens: Any, name: str, use_cache: bool) -> None:
    """With a cache every new token arrives as a chunk whose row 0 is not position 0; it must be left alone."""
    condition = conditions(lens)[name]
    tokens = torch.tensor([[0, 5, 9, 14, 20]])
    with applied(lens, condition):
        out = lens.original_model.generate(
            tokens, max_new_tokens=N_NEW, do_sample=False, use_cache=use_cache, return_dict_in_generate=True,
            output_logits=True, pad_token_id=1, eos_token_id=None,
        )  # fmt: skip
    for step, logits in enumerate(out.logits):
        expected = recomputed(lens, condition, out.sequences[:, : tokens.shape[1] + step])
        torch.testing.assert_close(logits.double(), expected.double(), rtol=1e-6, atol=1e-6)


def test_editing_row_0_of_every_chunk_would_be_seen(lens: Any) -> None:
    """The trap itself: a hook that takes a chunk's row 0 for position 0 gives other logits from the second step on."""

    def of_chunk(tensor: Tensor, hook: Any) -> Tensor:
        tensor = tensor.clone()
        tensor[:, 0] = 0.0
        return tensor

    point = lens.require_hook("blocks.1.hook_mlp_out")
    handle = point.add_hook(of_chunk)
    try:
        out = lens.original_model.generate(
            torch.tensor([[0, 5, 9, 14, 20]]), max_new_tokens=N_NEW, do_sample=False, return_dict_in_generate=True,
            output_logits=True, pad_token_id=1, eos_token_id=None,
        )  # fmt: skip
    finally:
        handle.hook.remove()
        point.fwd_hooks.clear()
    right = [
        recomputed(lens, conditions(lens)["bos-mlp"], out.sequences[:, : 5 + step]) for step in range(N_NEW)
    ]
    gaps = [float((found - expected).abs().max()) for found, expected in zip(out.logits, right, strict=True)]
    assert gaps[0] < 1e-5
    assert min(gaps[1:]) > 1e-3


@pytest.mark.parametrize(("use_cache", "calls"), [(True, 1), (False, N_NEW)])
def test_the_edit_is_reached_once_where_a_cache_holds_position_0(
    lens: Any, use_cache: bool, calls: int
) -> None:
    seen: list[list[int]] = []

    def count(tensor: Tensor, site: Site) -> Tensor:
        seen.append(site.positions[0, site.mask([0])[0]].tolist())
        return torch.zeros_like(tensor)

    with applied(lens, [Edit("blocks.1.hook_mlp_out", count, positions=[0])]):
        lens.original_model.generate(
            torch.tensor([[0, 5, 9]]), max_new_tokens=N_NEW, do_sample=False, use_cache=use_cache, pad_token_id=1,
            eos_token_id=None,
        )  # fmt: skip
    assert seen == [[0]] * calls


def test_the_control_is_no_position_0_and_one_that_predicts() -> None:
    drawn = Counter(elsewhere(12, str(text), seed) for text in range(300) for seed in range(3))
    assert set(drawn) == set(range(1, 11))
    assert max(drawn.values()) < 2 * min(drawn.values())
    assert elsewhere(12, "a", 0) == elsewhere(12, "a", 0)
    assert len({elsewhere(1000, "a", seed) for seed in range(5)}) == 5
    assert [elsewhere(length, "a", 0) for length in (1, 2, 3)] == [None, 1, 1]


def test_the_control_needs_texts() -> None:
    site = Site("blocks.0.hook_mlp_out", 0, torch.arange(4)[None])
    with pytest.raises(LookupError, match="run it on texts"):
        ZeroElsewhere(0)(torch.ones(1, 4, 8), site)


def test_a_control_is_averaged_over_its_seeds_within_a_text() -> None:
    """Only position 0 is read in the planted network, so another position costs little; `texts` has a row a seed."""
    found = run("bos-mlp", bos_lens(), params={"layer": SHRINKER, "seeds": 2})
    control = row(found, "bos-mlp", "other position: given layer")
    assert control["n_seeds"] == 2
    assert 0 < abs(control["delta_nats"]) < 0.1
    own = [one for one in rows(found, "bos-mlp", "texts") if one["condition"] == control["condition"]]
    assert len(own) == 2 * len(TEXTS)
    n = sum(one["n_predicted"] for one in own) / 2
    mean = sum(one["loss"] * one["n_predicted"] for one in own) / 2 / n
    assert math.exp(mean) == pytest.approx(control["ppl"], rel=1e-9)


@pytest.mark.parametrize(
    ("asked", "layers"), [("all", [0, 1, 2, 3]), ("3", [3]), ("2,0", [0, 2]), (" 0 - 2 , 1", [0, 1, 2])]
)
def test_layers_by_name(asked: str, layers: list[int]) -> None:
    assert layers_in(asked, toy_info(n_layers=4)) == layers
