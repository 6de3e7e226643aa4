"""The MLP at BOS and queries and keys, alone and together: arms against whole forwards, and the interaction."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from phaselens.testing import check_metric
from phaselens_plugins.combined import Combined
from tests.plugins.ablations import TEXTS, notes, predicted, row, rows, run, zero_at
from tests.plugins.qk_models import naive_loss, pooled, states, top_cells, write
from tests.plugins.test_qk_disruption import other_fold
from tests.toys import toy_lens

NAME = "combined"
LAYER = 0


@pytest.fixture(scope="module")
def lens() -> Any:
    return toy_lens("llama-gqa", dtype=torch.float64)


@pytest.fixture(scope="module")
def result(lens: Any) -> Any:
    return run(NAME, lens, params={"layer": LAYER})


@pytest.fixture(scope="module")
def reference(lens: Any) -> dict[str, np.ndarray]:
    """Return the loss [text] of each arm by whole forwards."""
    points = [f"blocks.{layer}.attn.{name}" for layer in range(2) for name in ("hook_rot_q", "hook_rot_k")]
    clean = {text: states(lens, text, points) for text in TEXTS}
    mlp = [(f"blocks.{LAYER}.hook_mlp_out", zero_at(0))]
    losses: dict[str, list[float]] = {"base": [], "bos": [], "qk": [], "both": []}
    for text in TEXTS:
        selection_states = [clean[other_text] for other_text in other_fold(TEXTS, text)]
        disturb = [(point, write(top_cells(pooled(selection_states, point)))) for point in points]
        for arm, hooks in (("base", []), ("bos", mlp), ("qk", disturb), ("both", [*mlp, *disturb])):
            losses[arm].append(naive_loss(lens, text, hooks))
    return {arm: np.array(values) for arm, values in losses.items()}


def arms(result: Any) -> tuple[str, str, str]:
    """Return the names of the three conditions."""
    bos, qk, combination = [r["condition"] for r in rows(result, NAME) if r["condition"] != "baseline"]
    return bos, qk, combination


def test_each_arm_equals_whole_forwards(result: Any, reference: dict[str, np.ndarray]) -> None:
    bos, qk, combination = arms(result)
    assert qk == "top-1"
    assert combination == f"{bos} + {qk}"
    for name, arm in ((bos, "bos"), (qk, "qk"), (combination, "both")):
        measured = [r["loss"] for r in rows(result, NAME, "texts") if r["condition"] == name]
        assert measured == pytest.approx(reference[arm], abs=1e-6)
    assert [row(result, NAME, name)["layer"] for name in arms(result)] == [LAYER, None, LAYER]


def test_cells_are_selected_without_the_mlp_removal(lens: Any, reference: dict[str, np.ndarray]) -> None:
    """Cells selected under the removal would differ in this model, and so would the losses."""
    points = [f"blocks.{layer}.attn.{name}" for layer in range(2) for name in ("hook_rot_q", "hook_rot_k")]
    mlp = [(f"blocks.{LAYER}.hook_mlp_out", zero_at(0))]
    removed = {text: states(lens, text, points, mlp) for text in TEXTS}
    losses = []
    for text in TEXTS:
        selection_states = [removed[other_text] for other_text in other_fold(TEXTS, text)]
        losses.append(
            naive_loss(
                lens, text, [*mlp, *((p, write(top_cells(pooled(selection_states, p)))) for p in points)]
            )
        )
    assert np.abs(np.array(losses) - reference["both"]).max() > 1e-4


def test_the_interaction_is_both_minus_each_text_by_text(
    lens: Any, result: Any, reference: dict[str, np.ndarray]
) -> None:
    (interaction,) = rows(result, NAME, "interactions")
    n = predicted(lens)
    extra = reference["both"] - reference["bos"] - reference["qk"] + reference["base"]
    assert interaction["interaction"] == pytest.approx((extra * n).sum() / n.sum(), abs=1e-9)
    assert interaction["interaction"] == pytest.approx(
        interaction["delta_together"] - interaction["delta_sum"], abs=1e-9
    )
    assert interaction["of_this_order"] == pytest.approx(interaction["interaction"], abs=1e-12)
    assert interaction["n_conditions"] == 2
    assert interaction["ci_low"] < interaction["interaction"] < interaction["ci_high"]
    mean, n_texts = (extra * n).sum() / n.sum(), len(n)
    variance = (np.square(extra - mean) * n).sum() / n.sum() * n_texts / (n_texts - 1)
    assert interaction["d_z"] == pytest.approx(mean / np.sqrt(variance), rel=1e-6)
    assert interaction["n_texts"] == len(TEXTS)
    (contrast,) = rows(result, NAME, "contrasts")
    assert contrast["control"] == "sum of each alone"
    assert (contrast["condition"], contrast["delta_nats"]) == (
        interaction["condition"],
        interaction["interaction"],
    )
    changes = {
        arm: ((reference[arm] - reference["base"]) * n).sum() / n.sum() for arm in ("bos", "qk", "both")
    }
    assert interaction["delta_together"] == pytest.approx(changes["both"], abs=1e-6)
    members = rows(result, NAME, "members")
    assert [member["delta_nats"] for member in members] == pytest.approx(
        [changes["bos"], changes["qk"]], abs=1e-6
    )
    assert [member["member_layer"] for member in members] == [LAYER, None]


def test_edits_without_a_common_path_do_not_interact(lens: Any) -> None:
    """In a model of one layer, no query or key reads what the MLP writes at BOS, and BOS attends to itself alone."""
    one_layer_lens = toy_lens("llama", dtype=torch.float64, num_hidden_layers=1)
    result = run(NAME, one_layer_lens, params={"layer": 0})
    (interaction,) = rows(result, NAME, "interactions")
    assert all(abs(member["delta_nats"]) > 1e-4 for member in rows(result, NAME, "members"))
    assert interaction["interaction"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("disruption", ["massive", "top-1-mean", "study-top-1"])
def test_every_disruption_of_queries_and_keys_can_be_combined(lens: Any, disruption: str) -> None:
    params = {"layer": 1, "disruption": disruption, "multiple": 1.3, "rotation": "pre"}
    combined_result = run(NAME, lens, params=params)
    bos, qk, combination = arms(combined_result)
    assert qk == disruption
    qk_result = run(
        "qk-disruption", lens, params={"conditions": disruption, "multiple": 1.3, "rotation": "pre"}
    )
    assert row(combined_result, NAME, qk)["ppl"] == row(qk_result, "qk-disruption", disruption)["ppl"]
    assert row(combined_result, NAME, bos)["layer"] == 1
    assert row(combined_result, NAME, combination)["ratio"] != 1


def test_the_layer_is_that_of_bos_mlp(lens: Any) -> None:
    result, bos_mlp_result = run(NAME, lens), run("bos-mlp", lens, params={"seeds": 0})
    expected = {
        r["condition"]: (r["layer"], r["ppl"])
        for r in rows(bos_mlp_result, "bos-mlp")
        if r["ratio"] is not None
    }
    layer_and_ppl = {r["condition"]: (r["layer"], r["ppl"]) for r in rows(result, NAME)}
    assert expected
    assert all(layer_and_ppl[name] == layer_ppl for name, layer_ppl in expected.items())


def test_without_a_massive_cell_the_combination_is_left_out_with_a_warning(lens: Any) -> None:
    result = run(NAME, lens, params={"disruption": "massive", "multiple": 50})
    assert rows(result, NAME, "interactions") == []
    assert notes(result, "massive is left out")


def test_one_text_is_missing_with_the_reason(lens: Any) -> None:
    result = run(NAME, lens, [TEXTS[0]])
    assert rows(result, NAME, "interactions") == []
    assert notes(result, "selected on texts other than those")


@pytest.mark.slow
def test_the_metric_keeps_the_contract() -> None:
    check_metric(Combined)


THREE = "bos-v seeds=0; layer-ablation part=mlp layers=1; qk-disruption conditions=top-1"


def test_three_conditions_have_all_combinations_and_the_interaction_of_third_order(lens: Any) -> None:
    result = run(NAME, lens, params={"conditions": THREE})
    points = [f"blocks.{layer}.attn.{name}" for layer in range(2) for name in ("hook_rot_q", "hook_rot_k")]
    clean = {text: states(lens, text, points) for text in TEXTS}
    bos = [(f"blocks.{layer}.attn.hook_v", zero_at(0)) for layer in range(2)]
    mlp = [("blocks.1.hook_mlp_out", zero_at(None))]
    losses: dict[str, list[float]] = {}
    for text in TEXTS:
        selection = [clean[other] for other in other_fold(TEXTS, text)]
        qk = [(point, write(top_cells(pooled(selection, point)))) for point in points]
        for name, hooks in {
            "": [], "b": bos, "m": mlp, "q": qk, "bm": [*bos, *mlp], "bq": [*bos, *qk], "mq": [*mlp, *qk],
            "bmq": [*bos, *mlp, *qk],
        }.items():  # fmt: skip
            losses.setdefault(name, []).append(naive_loss(lens, text, hooks))
    loss = {name: np.array(values) for name, values in losses.items()}
    n = predicted(lens)

    def mean(values: np.ndarray) -> float:
        return float((values * n).sum() / n.sum())

    interactions = rows(result, NAME, "interactions")
    assert [record["n_conditions"] for record in interactions] == [2, 2, 2, 3]
    largest = interactions[-1]
    assert largest["condition"] == "bos-v: all layers + layer-ablation: MLP off + qk-disruption: top-1"
    assert largest["layer"] == 1
    beyond = loss["bmq"] - loss["b"] - loss["m"] - loss["q"] + 2 * loss[""]
    assert largest["interaction"] == pytest.approx(mean(beyond), abs=1e-6)
    third = beyond - sum(loss[pair] - loss[pair[0]] - loss[pair[1]] + loss[""] for pair in ("bm", "bq", "mq"))
    assert largest["of_this_order"] == pytest.approx(mean(third), abs=1e-6)
    pairs = sum(record["of_this_order"] for record in interactions[:3])
    assert largest["interaction"] == pytest.approx(pairs + largest["of_this_order"], abs=1e-9)
    assert len(rows(result, NAME, "members")) == 2 + 2 + 2 + 3


def test_conditions_of_several_layers_name_them(lens: Any) -> None:
    result = run(
        NAME, lens, params={"conditions": "layer-ablation part=mlp layers=0; layer-ablation part=attn"}
    )
    combinations_run = {(r["condition"], r["layer"]) for r in rows(result, NAME, "interactions")}
    assert combinations_run == {
        ("layer-ablation part=mlp layers=0: MLP off + layer-ablation part=attn: attention off", 0),
        (
            "layer-ablation part=mlp layers=0: MLP off (layer 0) + layer-ablation part=attn: attention off (layer 1)",
            None,
        ),
    }


def test_a_metric_brings_its_own_conditions_only(lens: Any) -> None:
    result = run(NAME, lens, params={"conditions": "bos-v; sink-removal shifts=-inf; p-rope p=0 ends=low"})
    largest = rows(result, NAME, "interactions")[-1]
    assert largest["condition"] == "bos-v: all layers + sink-removal: all layers, b = -inf + p-rope: p = 0"
    assert largest["n_conditions"] == 3
    assert len(rows(result, NAME, "interactions")) == 4
    with_table = run(NAME, lens, params={"conditions": "layer-ablation layers=0; sink-removal beside=true"})
    assert any("sink-removal: bos-v" in row["condition"] for row in rows(with_table, NAME))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"conditions": "bos-v"}, "conditions: 1 metric; name 2 to 5"),
        ({"conditions": "bos-v; combined"}, "combined cannot be combined with itself"),
        ({"conditions": "bos-v; passkey"}, "passkey measures on prompts of its own"),
        ({"conditions": "bos-v; sinks"}, "'sinks' does not change the model"),
        ({"conditions": "bos-v; bos-v"}, "'bos-v' is given twice"),
    ],
)
def test_metrics_that_cannot_be_combined_are_refused(lens: Any, params: dict[str, Any], message: str) -> None:
    import phaselens
    from phaselens.plugin import plugins

    result = phaselens.run(lens, metrics=[(plugins().metric(NAME), params)], texts=TEXTS)
    (failure,) = result.metrics[NAME].failures
    assert message in failure.message


def test_parameters_of_the_default_conditions_are_refused_beside_others() -> None:
    from phaselens import InputError

    with pytest.raises(InputError, match="layer belongs to the default conditions; write it behind"):
        Combined.Params.parse({"conditions": "bos-v; bos-mlp", "layer": 1})
