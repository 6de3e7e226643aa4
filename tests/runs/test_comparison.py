"""Models compared text by text: pairing, refusals, notes, and agreement with a direct computation."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

import phaselens
from phaselens.errors import InputError
from phaselens.runs import DIFFERENCES, Run
from tests.toys import letters, toy_lens

TEXTS = [letters(5 + 3 * index, index) for index in range(7)]
METRICS = ["sinks", "bos-norm", "bos-mlp", "massive-values"]


def measured(**options: Any) -> Run:
    lenses = [toy_lens(seed=seed, label=label) for seed, label in ((0, "a"), (1, "b"))]
    return phaselens.run(lenses, metrics=METRICS, texts=TEXTS, **options)


@pytest.fixture(scope="module")
def run() -> Run:
    return measured()


def rows(comparison: Any, **chosen: Any) -> list[dict[str, Any]]:
    return [
        record
        for record in comparison.differences.records()
        if all(record[name] == value for name, value in chosen.items())
    ]


def by_text(run: Run, metric: str, column: str, model: str, **chosen: Any) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {}
    for record in run.rows(metric, "texts").records():
        if record["model"] == model and all(record[name] == value for name, value in chosen.items()):
            values.setdefault(record["text"], []).append(record[column])
    return values


@pytest.mark.slow
def test_heads_of_a_text_are_averaged_before_texts_are_paired(run: Run) -> None:
    comparison = phaselens.compare(run)
    for layer in range(run.models[0].info.n_layers):
        (row,) = rows(comparison, metric="sinks", value="score", layer=layer)
        sides = [by_text(run, "sinks", "score", model, layer=layer) for model in ("a", "b")]
        first, second = (np.array([np.mean(side[text]) for text in side]) for side in sides)
        differences = second - first
        assert row["n_texts"] == 7
        assert row["first"] == pytest.approx(first.mean(), rel=1e-12)
        assert row["difference"] == pytest.approx(differences.mean(), rel=1e-9)
        exact = stats.permutation_test(
            (differences,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
        )
        assert row["p_value"] == pytest.approx(exact.pvalue, rel=1e-9)
        assert row["d_z"] == pytest.approx(differences.mean() / differences.std(ddof=1), rel=1e-9)
        assert row["ci_low"] <= row["difference"] <= row["ci_high"]
        assert row["excludes_zero"] == int(row["ci_low"] > 0 or row["ci_high"] < 0)


def test_conditions_are_compared_by_their_loss_over_the_baseline(run: Run) -> None:
    comparison = phaselens.compare(run)
    (row,) = rows(comparison, metric="bos-mlp", value="loss over the baseline", condition="write layer")
    sides = []
    for model in ("a", "b"):
        edited = by_text(run, "bos-mlp", "loss", model, condition="write layer")
        baseline = by_text(run, "bos-mlp", "loss", model, condition="baseline")
        sides.append(np.array([np.mean(edited[text]) - np.mean(baseline[text]) for text in edited]))
    assert (row["first"], row["second"]) == pytest.approx((sides[0].mean(), sides[1].mean()), rel=1e-9)
    assert row["difference"] == pytest.approx((sides[1] - sides[0]).mean(), rel=1e-9)
    (start,) = rows(comparison, metric="bos-mlp", value="loss of the baseline")
    assert start["condition"] == "baseline"


def test_a_condition_in_different_layers_is_paired_and_noted(run: Run) -> None:
    changed_run = run.copy()
    layer = next(
        r["layer"] for r in run.rows("bos-mlp", "texts").records() if r["condition"] == "write layer"
    )
    table = changed_run.metrics["bos-mlp"].tables["texts"]
    index = table.spec.index("layer")
    table.rows[:] = [
        (*row[:index], 1 - layer, *row[index + 1 :]) if row[0] == "b" and row[index] == layer else row
        for row in table.rows
    ]
    comparison = phaselens.compare(run, changed_run, models=("a", "b"))
    (row,) = rows(comparison, condition="write layer")
    assert row["layer"] is None
    assert f"bos-mlp: write layer is layer {layer} of a and layer {1 - layer} of b" in comparison.notes


def test_null_columns_and_lists_are_not_compared(run: Run) -> None:
    values = {row["value"] for row in rows(phaselens.compare(run))}
    assert not any("null" in value for value in values)
    assert {row["table"] for row in rows(phaselens.compare(run))} == {"texts"}


def test_a_model_does_not_differ_from_itself(run: Run) -> None:
    comparison = phaselens.compare(run, run.copy(), models=("a", "a"))
    assert {row["difference"] for row in rows(comparison)} == {0.0}
    assert {row["p_value"] for row in rows(comparison)} == {1.0}
    assert {row["excludes_zero"] for row in rows(comparison)} == {0}


def test_the_sign_changes_with_the_order(run: Run) -> None:
    forth = phaselens.compare(run, models=("a", "b"))
    back = phaselens.compare(run, models=("b", "a"))
    for forward, backward in zip(rows(forth), rows(back), strict=True):
        assert (forward["metric"], forward["value"], forward["layer"]) == (
            backward["metric"],
            backward["value"],
            backward["layer"],
        )
        assert forward["difference"] == pytest.approx(-backward["difference"], abs=1e-12)
        assert forward["p_value"] == backward["p_value"]


def test_other_metrics_change_nothing(run: Run) -> None:
    lenses = [toy_lens(seed=0, label="a"), toy_lens(seed=1, label="b")]
    single_run = phaselens.run(lenses, metrics=["sinks"], texts=TEXTS)
    assert rows(phaselens.compare(run), metric="sinks") == rows(phaselens.compare(single_run))


def test_a_text_without_a_value_is_left_out_of_its_cell_alone(run: Run) -> None:
    changed_run = run.copy()
    table = changed_run.metrics["bos-norm"].tables["texts"]
    index, layer = table.spec.index("bos_ratio"), table.spec.index("layer")
    first_text = run.texts[0].id
    table.rows[:] = [
        (*row[:index], None, *row[index + 1 :]) if row[:2] == ("b", first_text) and row[layer] == 1 else row
        for row in table.rows
    ]
    comparison = phaselens.compare(run, changed_run, models=("a", "b"))
    counts = {row["layer"]: row["n_texts"] for row in rows(comparison, metric="bos-norm", value="bos_ratio")}
    assert counts.pop(1) == 6
    assert set(counts.values()) == {7}


def changed(run: Run, **model: Any) -> Run:
    """Return the run with other facts of its second model."""
    changed_run = run.copy()
    info = {name: value for name, value in model.items() if name in vars(changed_run.models[1].info)}
    record = {name: value for name, value in model.items() if name not in info}
    changed_run.models[1] = replace(
        changed_run.models[1], info=replace(changed_run.models[1].info, **info), **record
    )
    return changed_run


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("bos", {"starts_with_bos": False}, "bos auto, no BOS at position 0"),
        ("precision", {"dtype": "bfloat16"}, "dtype float32 and bfloat16"),
        ("precision", {"quantisation": "int8"}, "quantisation None and int8"),
        ("numerics", {"device": "cuda:0"}, "on cpu and on cuda"),
        ("numerics", {"attention_path": "eager"}, "by 'eager'"),
        ("numerics", {"versions": {"torch": "2.6"}}, "with torch .* and 2.6"),
    ],
)
def test_what_differs_besides_the_model_is_refused_by_name(
    run: Run, name: str, change: dict[str, Any], message: str
) -> None:
    changed_run = changed(run, **change)
    with pytest.raises(InputError, match=message) as caught:
        phaselens.compare(run, changed_run, models=("a", "b"))
    assert f"--allow {name}" in str(caught.value)
    allow = [name, "numerics"]
    comparison = phaselens.compare(run, changed_run, models=("a", "b"), allow=allow)
    assert any(message.split()[-1].strip("'.") in difference for difference in comparison.allowed)
    assert comparison.to_dict()["allowed"] == comparison.allowed


@pytest.mark.slow
def test_other_texts_are_refused_or_left_out(run: Run) -> None:
    changed_run = measured(n_texts=5)
    with pytest.raises(InputError, match=r"2 of 7 texts are not in both .* such as '5' .--allow texts"):
        phaselens.compare(run, changed_run, models=("a", "b"))
    comparison = phaselens.compare(run, changed_run, models=("a", "b"), allow=["texts"])
    assert {row["n_texts"] for row in rows(comparison)} == {5}
    changed_run.texts[:] = [replace(text, sha256="0" * 64) for text in changed_run.texts]
    with pytest.raises(InputError, match="no text in common"):
        phaselens.compare(run, changed_run, models=("a", "b"), allow=["texts"])


@pytest.mark.slow
def test_other_lengths_parameters_and_versions_are_refused(run: Run) -> None:
    with pytest.raises(InputError, match=r"texts were cut to 512 and to 6 tokens .--allow length"):
        phaselens.compare(run, measured(max_tokens=6), models=("a", "b"))
    lenses = [toy_lens(seed=0, label="a"), toy_lens(seed=1, label="b")]
    changed_run = phaselens.run(lenses, metrics=[("sinks", {"threshold": 0.1})], texts=TEXTS)
    with pytest.raises(InputError, match=r"sinks.threshold is 0\.3 in one run and 0\.1"):
        phaselens.compare(run, changed_run, models=("a", "b"))
    allowed = phaselens.compare(run, changed_run, models=("a", "b"), allow=["parameters"])
    assert allowed.notes == ["in one run only: bos-norm, bos-mlp, massive-values"]
    older = run.copy()
    older.metrics["sinks"] = replace(older.metrics["sinks"], distribution="phaselens 0.0.1")
    with pytest.raises(
        InputError, match=r"sinks is version .*\(phaselens 0\.0\.1\) in the other .--allow definitions"
    ):
        phaselens.compare(run, older, models=("a", "b"))


def test_another_seed_or_phaselens_is_refused(run: Run) -> None:
    other_seed = replace(run.copy(), options={**run.options, "seed": 7})
    with pytest.raises(InputError, match=r"the seed is 0 in one run and 7 in the other .--allow parameters"):
        phaselens.compare(run, other_seed, models=("a", "b"))
    older = replace(run.copy(), versions={**run.versions, "phaselens": "0.0.1"})
    with pytest.raises(InputError, match=r"with phaselens .* and 0\.0\.1 .--allow numerics"):
        phaselens.compare(run, older, models=("a", "b"))


def test_texts_that_were_cut_for_one_model_only_are_refused(run: Run) -> None:
    changed_run = run.copy()
    changed_run.texts[:3] = [replace(text, cut={"a": False, "b": True}) for text in changed_run.texts[:3]]
    with pytest.raises(
        InputError, match=r"3 texts were cut for one of a and b only, such as '0' .--allow length"
    ):
        phaselens.compare(changed_run)
    comparison = phaselens.compare(changed_run, allow=["length"])
    assert comparison.allowed == ["length: 3 texts were cut for one of a and b only, such as '0'"]


def test_equal_labels_are_told_apart_by_their_runs(run: Run, tmp_path: Any) -> None:
    assert phaselens.compare(run).titles == ("a", "b")
    comparison = phaselens.compare(run, run.copy(), models=("a", "a"))
    assert comparison.titles == ("a (first run)", "a (second run)")
    named = [replace(run.copy(), directory=tmp_path / name) for name in ("before", "after")]
    comparison = phaselens.compare(*named, models=("a", "a"))
    assert comparison.titles == ("a (before)", "a (after)")
    assert comparison.to_dict()["directories"] == [str(tmp_path / "before"), str(tmp_path / "after")]


@pytest.mark.slow
def test_models_are_chosen_or_named(run: Run) -> None:
    single_run = phaselens.run(toy_lens(seed=1, label="b"), metrics=METRICS, texts=TEXTS)
    assert phaselens.compare(run, single_run).first == phaselens.compare(run, single_run).second == "b"
    with pytest.raises(InputError, match=r"the runs have the models a, b and a, b; name one of each"):
        phaselens.compare(run, run.copy())
    with pytest.raises(InputError, match=r"the run has 1 models .b.; name two of them"):
        phaselens.compare(single_run)
    with pytest.raises(InputError, match="the run has no model 'c'"):
        phaselens.compare(run, models=("a", "c"))
    with pytest.raises(InputError, match="expected models as two labels"):
        phaselens.compare(run, models=("a",))
    with pytest.raises(InputError, match="no metric in common"):
        phaselens.compare(run, phaselens.run(toy_lens(label="b"), metrics=["compression"], texts=TEXTS))


def test_values_that_cannot_be_used_are_refused(run: Run) -> None:
    with pytest.raises(InputError, match="expected first as a Run"):
        phaselens.compare("rope")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="allow: 'text' is not a difference; did you mean texts"):
        phaselens.compare(run, allow=["text"])
    with pytest.raises(InputError, match="expected allow as a list"):
        phaselens.compare(run, allow="texts")
    assert set(DIFFERENCES) == {
        "texts",
        "labels",
        "length",
        "bos",
        "parameters",
        "definitions",
        "precision",
        "numerics",
    }


def test_one_text_has_differences_without_intervals() -> None:
    lenses = [toy_lens(seed=0, label="a"), toy_lens(seed=1, label="b")]
    comparison = phaselens.compare(phaselens.run(lenses, metrics=["sinks"], texts=TEXTS[:1]))
    assert {row["ci_low"] for row in rows(comparison)} == {None}
    assert comparison.n_differences == 0
    assert all(math.isfinite(row["difference"]) for row in rows(comparison))


def test_the_table_is_arrow_and_json(run: Run) -> None:
    comparison = phaselens.compare(run)
    assert comparison.table().num_rows == len(comparison.differences.rows)
    values = comparison.to_dict()
    assert values["schema"] == "phaselens.comparison/1"
    assert values["n_differences"] == comparison.n_differences
