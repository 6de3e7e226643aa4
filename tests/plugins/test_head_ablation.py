"""head-ablation: heads removed against TransformerLens' hooks, their looks against dense float64, planted truths."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from phaselens.testing import check_metric
from phaselens_plugins.head_ablation import HeadAblation
from tests.marks import mark_later_slow
from tests.plugins.ablations import TEXTS, notes, predicted, rows, run
from tests.plugins.qk_models import naive_loss, states
from tests.toys import letters, toy_lens

METRIC = "head-ablation"
DISTINCT = [*TEXTS, letters(12, 2), letters(19, 4)]


def replaced(head: int, value: Any) -> Any:
    """Return a TransformerLens hook that writes a value into one head's z."""

    def hook(z: torch.Tensor, hook: Any) -> torch.Tensor:
        z = z.clone()
        z[:, :, head] = value
        return z

    return hook


def reference(lens: Any, layer: int, head: int, values: Any = lambda text: 0.0) -> float:
    """Return the change of the loss over all predicted tokens by whole forwards."""
    n = predicted(lens)
    point = f"blocks.{layer}.attn.hook_z"
    change = [
        naive_loss(lens, text, [(point, replaced(head, values(text)))]) - naive_loss(lens, text, [])
        for text in TEXTS
    ]
    return float((np.array(change) * n).sum() / n.sum())


@pytest.mark.parametrize("family", mark_later_slow(["llama-gqa", "gpt2", "bitnet"]))
def test_each_head_costs_what_whole_forwards_say(family: str) -> None:
    lens = toy_lens(family, dtype=torch.float64)
    result = run(HeadAblation, lens)
    heads = {(record["layer"], record["head"]): record for record in rows(result, METRIC, "heads")}
    assert len(heads) == lens.info.n_layers * lens.info.n_heads
    for layer, head in ((0, 1), (1, 3)):
        assert heads[layer, head]["delta_nats"] == pytest.approx(reference(lens, layer, head), abs=1e-7)
    (condition,) = [r for r in rows(result, METRIC) if (r["layer"], r["head"]) == (1, 3)]
    assert condition["condition"] == "head := 0"
    assert heads[1, 3]["delta_low"] == condition["delta_low"]


def test_the_mean_is_that_of_the_other_texts_tokens() -> None:
    lens = toy_lens("llama-gqa", dtype=torch.float64)
    result = run(HeadAblation, lens, params={"value": "mean", "layers": "1"})
    point = "blocks.1.attn.hook_z"
    z = {text: states(lens, text, [point])[point] for text in TEXTS}

    def mean_of_others(text: str) -> torch.Tensor:
        others = torch.cat([torch.as_tensor(z[other]).reshape(-1, 4, 8) for other in TEXTS if other != text])
        return others[:, 2].mean(0)

    heads = {record["head"]: record for record in rows(result, METRIC, "heads")}
    assert heads[2]["delta_nats"] == pytest.approx(reference(lens, 1, 2, mean_of_others), abs=1e-7)
    alone = run(HeadAblation, lens, [TEXTS[0]], params={"value": "mean"})
    assert notes(alone, "no head is removed", "use two texts or more")


def test_the_appearance_of_a_head_is_that_of_the_dense_matrix() -> None:
    lens = toy_lens("llama-gqa", dtype=torch.float64)
    result = run(HeadAblation, lens)
    w_o = lens.original_model.model.layers[1].self_attn.o_proj.weight.detach().T.reshape(4, 8, -1)
    sinks, entropies, outputs, shares = [], [], [], []
    for text in TEXTS:
        ids = torch.tensor([lens.text_tokenizer(text)["input_ids"]])
        _, cache = lens.run_with_cache(ids)
        pattern, z = cache["blocks.1.attn.hook_pattern"][0], cache["blocks.1.attn.hook_z"][0]
        sinks.append(pattern[:, 1:, 0].mean(-1))
        entropy = torch.special.entr(pattern).sum(-1)[:, 1:]
        entropies.append((entropy / torch.arange(2, len(z) + 1).log()).mean(-1))
        outputs.append(torch.einsum("thd,hdm->thm", z, w_o).norm(dim=-1).mean(0))
        shares.append(outputs[-1] / outputs[-1].mean())
    heads = [record for record in rows(result, METRIC, "heads") if record["layer"] == 1]
    for column, values in (
        ("sink", sinks),
        ("entropy", entropies),
        ("output", outputs),
        ("output_share", shares),
    ):
        expected = torch.stack(values).mean(0).tolist()
        assert [head[column] for head in heads] == pytest.approx(expected, rel=1e-6)


def test_rank_correlations_are_scipys_over_all_heads() -> None:
    result = run(HeadAblation, toy_lens("llama-gqa", dtype=torch.float64), DISTINCT)
    heads = rows(result, METRIC, "heads")
    for record in rows(result, METRIC, "ranks"):
        expected = stats.spearmanr(
            [head["delta_nats"] for head in heads], [head[record["quantity"]] for head in heads]
        )
        assert record["spearman"] == pytest.approx(expected.statistic, abs=1e-12)
        assert record["n_heads"] == 8
        assert -1 <= record["ci_low"] <= record["spearman"] <= record["ci_high"] <= 1
        assert record["null"] == 0
    assert [record["quantity"] for record in rows(result, METRIC, "ranks")] == [
        "sink",
        "entropy",
        "output_share",
    ]


def test_a_head_that_writes_nothing_is_idle_and_one_that_all_depends_on_is_not() -> None:
    lens = toy_lens("llama", dtype=torch.float64)
    projection = lens.original_model.model.layers[1].self_attn.o_proj
    with torch.no_grad():
        projection.weight[:, 16:24] = 0.0  # head 2
        projection.weight[:, 8:16] *= 20  # head 1
    result = run(HeadAblation, lens, params={"layers": "1"})
    heads = rows(result, METRIC, "heads")
    assert (heads[2]["delta_nats"], heads[2]["delta_low"], heads[2]["output_share"]) == (0.0, 0.0, 0.0)
    flags = [(head["idle_by_loss"], head["surely_idle"], head["idle_by_output"]) for head in heads]
    assert flags[2] == (1, 1, 1)
    assert flags[1][1:] == (0, 0)
    assert abs(heads[1]["delta_nats"]) > 0.005
    (layer,) = rows(result, METRIC, "layers")
    idle = [head["idle_by_loss"] for head in heads]
    quiet = [head["idle_by_output"] for head in heads]
    assert layer["idle_by_loss"] == np.mean(idle)
    assert layer["both"] == np.mean(np.array(idle) & np.array(quiet))
    assert layer["both_expected"] == pytest.approx(np.mean(idle) * np.mean(quiet))
    assert layer["largest_head"] == int(np.argmax([head["delta_nats"] for head in heads]))
    (summary,) = rows(result, METRIC, "summary")
    assert summary["idle_by_loss"] == layer["idle_by_loss"]
    assert summary["n_heads"] == 4


def test_every_head_of_a_layer_shares_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The output of a layer's attention is computed once for the conditions of all of its heads."""
    from phaselens.lens import attention_dispatch

    calls: list[int] = []
    sdpa = attention_dispatch.sdpa_attention_forward

    def counted(module: Any, *args: Any, **options: Any) -> Any:
        calls.append(module.layer_idx)
        return sdpa(module, *args, **options)

    monkeypatch.setattr(attention_dispatch, "sdpa_attention_forward", counted)
    lens = toy_lens("llama")
    run(HeadAblation, lens, [letters(9)])  # which also checks the unembedding
    calls.clear()
    run(HeadAblation, lens, [letters(9)])
    # Layer 1 runs for each of the 4 conditions of layer 0, once for its own 4, and once for the baseline; layer 0 once
    # for its conditions and once for the baseline. The kernels of the unedited pass with statistics are others.
    assert [calls.count(layer) for layer in (0, 1)] == [2, 6]


@pytest.mark.slow
def test_layers_without_heads_are_named() -> None:
    import phaselens
    from tests.lens.measured import model_of
    from tests.toys import toy_tokenizer

    for model_type, n_heads in (("qwen3_next", 4), ("mamba", 0)):
        lens = phaselens.load(model_of(model_type), label=model_type, check=False)
        lens.text_tokenizer = toy_tokenizer()
        result = run(HeadAblation, lens)
        assert len(rows(result, METRIC, "heads")) == n_heads
        assert notes(result, "no heads to remove: layer 0 is")


@pytest.mark.slow
@pytest.mark.parametrize("params", [{}, {"value": "mean", "layers": "1"}])
def test_the_metric_keeps_the_contract(params: dict[str, Any]) -> None:
    check_metric(HeadAblation, params)
