"""A study's table: measured values from the runs' tables, and reasons why they cannot be compared."""

from __future__ import annotations

from pathlib import Path

import pytest

from phaselens.errors import InputError
from phaselens.runs import StudyResult, run_study
from phaselens.runs.study_file import parse_study
from phaselens.runs.study_result import _reduced as reduced
from phaselens.runs.study_result import chosen_models
from tests.runs.studies import study_text
from tests.toys import save_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("studies") / "tiny")


@pytest.fixture(scope="module")
def result(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> StudyResult:
    study = parse_study(study_text(folder), "small")
    return run_study(study, models=[f"one={folder}"], out=tmp_path_factory.mktemp("out"))


@pytest.mark.slow
def test_published_and_measured_values_are_subtracted(result: StudyResult) -> None:
    layers = result.runs["published"].rows("sinks", "layers").records()
    rows = result.table.records()
    for layer, published in ((0, 0.5), (1, 0.25)):
        assert rows[layer]["measured"] == layers[layer]["sink_rate"]
        assert rows[layer]["difference"] == layers[layer]["sink_rate"] - published
        assert (rows[layer]["comparable"], rows[layer]["why"]) == ("yes", "")
    norms = [row["bos_norm"] for row in result.runs["published"].rows("bos-norm", "layers").records()]
    assert rows[3]["measured"] == float(norms.index(max(norms)))
    assert (rows[3]["comparable"], rows[3]["why"]) == ("no", "other precision: 4 bits")


def test_what_is_missing_has_a_reason(result: StudyResult) -> None:
    rows = result.table.records()
    assert (rows[2]["measured"], rows[2]["why"]) == (None, "the measured model has no such layer")
    assert (rows[4]["measured"], rows[4]["why"]) == (None, "this model is not measured")


def test_the_runs_are_kept(result: StudyResult) -> None:
    directory = result.runs["published"].directory
    assert directory is not None
    assert (directory / "result.json").is_file()
    assert result.failed == []


def test_another_model_is_a_reason(folder: Path) -> None:
    study = parse_study(study_text("org/original"), "small")
    rows = run_study(study, models=[str(folder)]).table.records()
    assert rows[0]["why"] == f"other model: {folder} in place of org/original"


def test_models_are_taken_in_order_or_by_label() -> None:
    study = parse_study(study_text(), "small")
    assert chosen_models(study, []) == {"one": "rope", "two": "org/another-model"}
    assert chosen_models(study, ["a", "b"]) == {"one": "a", "two": "b"}
    assert chosen_models(study, ["two=b", "a"]) == {"one": "a", "two": "b"}
    assert chosen_models(study, ["two=b"]) == {"two": "b"}
    with pytest.raises(InputError, match="has 2 models"):
        chosen_models(study, ["a", "b", "c"])


def test_rows_are_reduced_as_the_study_says_and_several_rows_without_a_rule_are_a_reason() -> None:
    numbers = [(2.0, 0), (5.0, 1), (-1.0, 2)]
    for reduce, expected in (("mean", 2.0), ("min", -1.0), ("max", 5.0), ("argmin", 2.0), ("argmax", 1.0)):
        assert reduced(numbers, reduce) == (expected, "")
    assert reduced([(2.0, None)], "argmax") == (None, "its rows have no layer")
    assert reduced(numbers[:1], "") == (2.0, "")
    assert reduced(numbers, "") == (None, "3 rows fit; a study names one, or says how to reduce them")
