"""p-RoPE: its ends are the unedited model and `positions="nope"`, its middle is that of hand-made cos and sin."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

import phaselens
from phaselens.errors import InputError
from phaselens.lens.checks import capture
from phaselens.plugin import Condition
from phaselens.runs import applied
from phaselens.testing import check_metric, tiny_model
from phaselens_plugins.p_rope import PRope, parse_shares
from tests.lens.test_rotation_pairs import CASES
from tests.marks import mark_later_slow
from tests.plugins import ablations
from tests.toys import letters, toy_lens

TEXTS = [letters(length, length) for length in (11, 29, 17, 2)]
METRIC = "p-rope"


def rows(result: Any, table: str) -> list[dict[str, Any]]:
    return ablations.rows(result, METRIC, table)


def conditions_of(lens: Any, **params: Any) -> dict[str, Condition]:
    return {condition.name: condition for condition in PRope(lens.info, PRope.Params(**params)).conditions()}


def logits_under(lens: Any, condition: Condition, tokens: Tensor) -> Tensor:
    with applied(lens, condition):
        return lens.stream(tokens, unembed=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    mark_later_slow(["llama", "a part of the head", "glm", "cohere", "yarn", "phi-4-mini", "bfloat16"], 4),
)
def test_no_frequency_rotated_equals_positions_nope_to_the_bit(name: str) -> None:
    lens = phaselens.load(CASES[name][0](), check=False)
    tokens = torch.randint(2, 60, (2, 24), generator=torch.Generator().manual_seed(0))
    original = lens.stream(tokens, unembed=True)
    edited = logits_under(lens, conditions_of(lens)["p = 0"], tokens)
    lens.set_rotation(nulled=True)
    assert torch.equal(edited, lens.stream(tokens, unembed=True))
    assert not torch.equal(edited, original)


@pytest.mark.parametrize("family", mark_later_slow(["smollm3", "gemma3", "gpt-oss", "phi3"], 2))
def test_layers_without_rotation_stay_as_they_are(family: str) -> None:
    lens = phaselens.load(tiny_model(family), check=False)
    tokens = torch.randint(2, 60, (1, 20), generator=torch.Generator().manual_seed(0))
    edited = logits_under(lens, conditions_of(lens)["p = 0"], tokens)
    lens.set_rotation(nulled=True)
    assert torch.equal(edited, lens.stream(tokens, unembed=True))


@pytest.mark.parametrize(
    ("end", "is_rotated"), [("lowest", [True, True, False, False]), ("highest", [False, False, True, True])]
)
def test_half_of_the_frequencies_are_those_of_hand_made_cos_and_sin(end: str, is_rotated: list[bool]) -> None:
    lens = toy_lens("llama", dtype=torch.float64)
    tokens = torch.randint(3, 28, (1, 20), generator=torch.Generator().manual_seed(0))
    edited = logits_under(lens, conditions_of(lens)[f"p = 0.5, {end} nulled"], tokens)
    # d_head is 8: pair i has the angle 10 ** −i, in entries i and i + 4.
    angles = torch.arange(20.0, dtype=torch.float64)[:, None] * 10.0 ** -torch.arange(
        4.0, dtype=torch.float64
    )
    angles = torch.where(torch.tensor(is_rotated), angles, 0.0).repeat(1, 2)[None]
    hooks = [
        (f"blocks.{layer}.attn.hook_{name}", lambda value, hook, new=new: new)
        for layer in range(2)
        for name, new in (("cos", angles.cos()), ("sin", angles.sin()))
    ]
    torch.testing.assert_close(edited, lens.stream(tokens, hooks, unembed=True), atol=1e-6, rtol=1e-6)


@pytest.mark.slow
def test_the_curve_begins_at_the_unedited_model_and_ends_at_nope() -> None:
    lens = toy_lens("llama", dtype=torch.float64)
    result = ablations.run(METRIC, lens, TEXTS, batch_tokens=64)
    curve = {(row["end"], row["p"]): row for row in rows(result, "curve")}
    assert [row["n_nulled"] for row in rows(result, "curve")] == [0, 1, 2, 3, 4] * 2
    for end in ("lowest", "highest"):
        start = curve[end, 1.0]
        assert (start["ratio"], start["ratio_low"], start["ratio_high"], start["delta_nats"]) == (
            1.0,
            1.0,
            1.0,
            0.0,
        )
    nulled = toy_lens("llama", dtype=torch.float64)
    nulled.set_rotation(nulled=True)
    losses = {}
    for label, model in (("rope", lens), ("nope", nulled)):
        run = phaselens.run(model, metrics=["position-curves", "sinks"], texts=TEXTS)
        table = run.rows("position-curves", "losses").records()
        losses[label] = sum(row["loss"] * row["n_positions"] for row in table)
        last = {"rope": curve["lowest", 1.0], "nope": curve["lowest", 0.0]}[label]
        (summary,) = run.rows("sinks", "summary").records()
        assert last["sink_rate"] == pytest.approx(summary["sink_rate"])
        assert last["mean_score"] == pytest.approx(summary["mean_score"])
        condition = {"rope": "baseline", "nope": "p = 0"}[label]
        layers = [row for row in rows(result, "sinks") if row["condition"] == condition]
        expected = run.rows("sinks", "layers").records()
        assert [row["sink_rate"] for row in layers] == [row["sink_rate"] for row in expected]
        assert [row["ci_low"] for row in layers] == pytest.approx([row["ci_low"] for row in expected])
    n_predicted = sum(len(lens.text_tokenizer(text)["input_ids"]) - 1 for text in TEXTS)
    delta = (losses["nope"] - losses["rope"]) / n_predicted
    for end in ("lowest", "highest"):
        assert curve[end, 0.0]["delta_nats"] == pytest.approx(delta, rel=1e-6)
    assert any("passkeys are missing" in warning for warning in result.warnings)


def test_sinks_under_a_condition_are_those_of_its_own_forward() -> None:
    lens = toy_lens("mistral", dtype=torch.float64)
    result = ablations.run(
        METRIC, lens, TEXTS[:1], params={"passkey_lengths": "", "p": "0.5", "ends": "high"}
    )
    ids = torch.tensor([lens.text_tokenizer(TEXTS[0])["input_ids"]])
    (condition,) = conditions_of(lens, p="0.5", ends="high", passkey_lengths="").values()
    with applied(lens, condition):
        _, patterns = capture(lens, ids, {layer: f"blocks.{layer}.attn.hook_pattern" for layer in range(2)})
    scores = [patterns[layer][0, :, 1:7, 0].mean(-1).numpy() for layer in range(2)]
    by_layer = [row for row in rows(result, "sinks") if row["condition"] == condition.name]
    assert [row["mean_score"] for row in by_layer] == pytest.approx(
        [score.mean() for score in scores], abs=1e-9
    )
    assert [row["sink_rate"] for row in by_layer] == pytest.approx(
        [(score >= 0.3).mean() for score in scores]
    )
    (row,) = rows(result, "curve")
    assert row["mean_score"] == pytest.approx(np.mean(scores), abs=1e-9)


@pytest.mark.slow
def test_a_model_without_positions_is_at_p_0_as_it_is() -> None:
    lenses = [toy_lens("llama"), toy_lens("llama-drope-nope")]
    result = phaselens.run(lenses, metrics=[(METRIC, {"passkey_lengths": "", "p": "1, 0.5"})], texts=TEXTS)
    assert not result.failed
    (point,) = [row for row in rows(result, "curve") if row["model"] == "llama-drope-nope"]
    baseline, *edited = [row for row in rows(result, "conditions") if row["model"] == "llama-drope-nope"]
    assert edited == []
    assert (point["p"], point["n_nulled"], point["ratio"], point["delta_nats"]) == (0.0, 0, 1.0, 0.0)
    assert (point["ppl"], point["n_texts"]) == (baseline["ppl"], baseline["n_texts"])
    sinks = phaselens.run(lenses[1], metrics=["sinks"], texts=TEXTS).rows("sinks", "summary").records()
    assert point["mean_score"] == pytest.approx(sinks[0]["mean_score"])
    assert any("no rotation is nulled" in note for note in result.warnings)
    figure = Figure()
    PRope.plot(result.metrics[METRIC].tables, figure)
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == [
        "llama, lowest nulled first",
        "llama, highest nulled first",
        "llama-drope-nope, not rotated",
    ]


def test_models_with_other_positions_and_wrong_shares_are_refused() -> None:
    with pytest.raises(InputError, match="has no rotated layer"):
        PRope(toy_lens("gpt2").info, PRope.Params())
    for text in ("", "2", "-0.1", "a, 0.5"):
        with pytest.raises(InputError, match="give shares from 0 to 1"):
            PRope.Params(p=text)
    assert parse_shares("0, .25,0.250, 1") == [1.0, 0.25, 0.0]
    coarse = PRope(toy_lens("gpt-neox").info, PRope.Params(p="0.9", passkey_lengths=""))
    assert coarse.conditions() == []
    assert coarse.warnings == ["p = 0.9 nulls no pair: there are too few"]


@pytest.mark.slow
def test_passkeys_are_those_of_the_passkey_metric_under_the_same_conditions() -> None:
    lens = phaselens.load("rope")
    params = {
        "p": "1, 0.5, 0",
        "ends": "low",
        "passkey_lengths": "64, 80",
        "passkey_depths": "0.5",
        "passkey_n": 2,
    }
    result = ablations.run(METRIC, lens, TEXTS, params=params)
    conditions = "p-rope p=0.5,0 ends=low passkey-lengths=''"
    options = {"lengths": "64, 80", "depths": "0.5", "n": 2, "null": "none", "conditions": conditions}
    passkey_run = phaselens.run(lens, metrics=("passkey", options), texts=TEXTS)
    accuracy = {
        (row["of"].removeprefix("p-rope: "), row["length"]): row["exact"]
        for row in passkey_run.rows("passkey", "accuracy").records()
    }
    table = rows(result, "passkeys")
    assert {(row["condition"], row["length"]): row["exact"] for row in table} == accuracy
    assert all(row["n"] == 2 for row in table)
    texts = {row["text"] for row in rows(result, "texts")}
    assert texts == {"0", "1", "2", "3"}


@pytest.mark.slow
def test_the_contract() -> None:
    check_metric(PRope, {"p": "0.5, 0"})
