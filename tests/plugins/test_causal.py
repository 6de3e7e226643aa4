"""Common behaviour of the ablations: absolute positions in generation, and controls drawn by a text's content."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from phaselens.plugin import Condition, Edit, Site, plugins
from phaselens.runs import applied
from phaselens_plugins._causal import ZeroOtherPosition, draw_other_position, parse_layers
from tests.plugins.ablations import TEXTS, row, rows, run
from tests.plugins.bos_models import SHRINKER, bos_lens
from tests.toys import toy_info, toy_lens

N_NEW = 5


@pytest.fixture(scope="module")
def lens() -> Any:
    return toy_lens("llama-gqa", dtype=torch.float64)


def conditions(lens: Any) -> dict[str, Condition]:
    """Return one condition of each metric that edits position 0, in layer 1 of a model."""
    params_by_metric = {
        "bos-v": {"layer": 1, "seeds": 0},
        "layer-ablation": {"part": "bos_only", "layers": "1", "seeds": 0},
    }
    conditions = {}
    for name, params in params_by_metric.items():
        metric = plugins().metric(name)
        conditions[name] = metric(lens.info, metric.Params.parse(params)).conditions()[-1]
    edits = [Edit("blocks.1.hook_mlp_out", 0.0, positions=[0])]
    return {**conditions, "bos-mlp": Condition("write layer", edits, layer=1)}


def reference_logits(lens: Any, condition: Condition, tokens: Tensor) -> Tensor:
    """Return the logits of the last position, by one whole forward whose row 0 is zeroed by TransformerLens' hooks."""

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
def test_generation_edits_position_0_only(lens: Any, name: str, use_cache: bool) -> None:
    """With a cache, every new token is a chunk whose row 0 is not position 0; it must not be edited."""
    condition = conditions(lens)[name]
    tokens = torch.tensor([[0, 5, 9, 14, 20]])
    with applied(lens, condition):
        out = lens.original_model.generate(
            tokens, max_new_tokens=N_NEW, do_sample=False, use_cache=use_cache, return_dict_in_generate=True,
            output_logits=True, pad_token_id=1, eos_token_id=None,
        )  # fmt: skip
    for step, logits in enumerate(out.logits):
        expected = reference_logits(lens, condition, out.sequences[:, : tokens.shape[1] + step])
        torch.testing.assert_close(logits.double(), expected.double(), rtol=1e-6, atol=1e-6)


def test_editing_row_0_of_every_chunk_would_be_detected(lens: Any) -> None:
    """A hook that takes a chunk's row 0 for position 0 gives other logits from the second step on."""

    def zero_chunk_row(tensor: Tensor, hook: Any) -> Tensor:
        tensor = tensor.clone()
        tensor[:, 0] = 0.0
        return tensor

    point = lens.require_hook("blocks.1.hook_mlp_out")
    handle = point.add_hook(zero_chunk_row)
    try:
        out = lens.original_model.generate(
            torch.tensor([[0, 5, 9, 14, 20]]), max_new_tokens=N_NEW, do_sample=False, return_dict_in_generate=True,
            output_logits=True, pad_token_id=1, eos_token_id=None,
        )  # fmt: skip
    finally:
        handle.hook.remove()
        point.fwd_hooks.clear()
    references = [
        reference_logits(lens, conditions(lens)["bos-mlp"], out.sequences[:, : 5 + step])
        for step in range(N_NEW)
    ]
    gaps = [
        float((logits - expected).abs().max())
        for logits, expected in zip(out.logits, references, strict=True)
    ]
    assert gaps[0] < 1e-5
    assert min(gaps[1:]) > 1e-3


@pytest.mark.parametrize(("use_cache", "calls"), [(True, 1), (False, N_NEW)])
def test_the_edit_runs_once_if_a_cache_holds_position_0(lens: Any, use_cache: bool, calls: int) -> None:
    edited_positions: list[list[int]] = []

    def count(tensor: Tensor, site: Site) -> Tensor:
        edited_positions.append(site.positions[0, site.mask([0])[0]].tolist())
        return torch.zeros_like(tensor)

    with applied(lens, [Edit("blocks.1.hook_mlp_out", count, positions=[0])]):
        lens.original_model.generate(
            torch.tensor([[0, 5, 9]]), max_new_tokens=N_NEW, do_sample=False, use_cache=use_cache, pad_token_id=1,
            eos_token_id=None,
        )  # fmt: skip
    assert edited_positions == [[0]] * calls


def test_the_control_position_is_not_0_and_predicts_a_token() -> None:
    drawn = Counter(draw_other_position(12, str(text), seed) for text in range(300) for seed in range(3))
    assert set(drawn) == set(range(1, 11))
    assert max(drawn.values()) < 2 * min(drawn.values())
    assert draw_other_position(12, "a", 0) == draw_other_position(12, "a", 0)
    assert len({draw_other_position(1000, "a", seed) for seed in range(5)}) == 5
    assert [draw_other_position(length, "a", 0) for length in (1, 2, 3)] == [None, 1, 1]


def test_the_control_needs_texts() -> None:
    site = Site("blocks.0.hook_mlp_out", 0, torch.arange(4)[None])
    with pytest.raises(LookupError, match="run this condition on texts"):
        ZeroOtherPosition(0)(torch.ones(1, 4, 8), site)


def test_a_control_is_averaged_over_seeds_text_by_text() -> None:
    """The planted network reads only position 0, so another position costs little; `texts` has one row per seed."""
    result = run("bos-mlp", bos_lens(), params={"layer": SHRINKER, "seeds": 2})
    control = row(result, "bos-mlp", "other position: given layer")
    assert control["n_seeds"] == 2
    assert 0 < abs(control["delta_nats"]) < 0.1
    control_rows = [
        record for record in rows(result, "bos-mlp", "texts") if record["condition"] == control["condition"]
    ]
    assert len(control_rows) == 2 * len(TEXTS)
    n = sum(record["n_predicted"] for record in control_rows) / 2
    mean = sum(record["loss"] * record["n_predicted"] for record in control_rows) / 2 / n
    assert math.exp(mean) == pytest.approx(control["ppl"], rel=1e-9)


@pytest.mark.parametrize(
    ("text", "layers"), [("all", [0, 1, 2, 3]), ("3", [3]), ("2,0", [0, 2]), (" 0 - 2 , 1", [0, 1, 2])]
)
def test_parsing_layers(text: str, layers: list[int]) -> None:
    assert parse_layers(text, toy_info(n_layers=4)) == layers
