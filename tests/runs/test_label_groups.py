"""Texts with labels: a column in tables, means by label, and comparisons of each label by itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import phaselens
from phaselens.data import Text
from phaselens.errors import InputError
from phaselens.report.formats import run_formats
from phaselens.report.label_tables import label_tables
from phaselens.runs import Run, group_by_label
from tests.report.runs import written
from tests.toys import letters, toy_lens

TEXTS = [Text(f"t{n}", letters(5 + 2 * n, n), "odd | <b>" if n % 2 else "even") for n in range(7)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    lenses = [toy_lens(seed=seed, label=label) for seed, label in ((0, "a"), (1, "b"))]
    folder = tmp_path_factory.mktemp("labels") / "run"
    return phaselens.run(lenses, metrics=["sinks", "bos-mlp"], texts=TEXTS, out=folder)


def unlabelled() -> Run:
    return phaselens.run(toy_lens(), metrics=["sinks"], texts=[letters(5), letters(6)])


@pytest.mark.slow
def test_labels_are_a_column_behind_the_ids(run: Run) -> None:
    for metric in ("sinks", "bos-mlp"):
        table = run.rows(metric, "texts")
        names = [column.name for column in table.spec.columns]
        assert names[names.index("text") + 1] == "label"
        labels = {text.id: text.label for text in TEXTS}
        assert all(record["label"] == labels[str(record["text"])] for record in table.records())
    assert "label" not in [column.name for column in run.rows("sinks", "layers").spec.columns]
    assert "label" not in [column.name for column in unlabelled().rows("sinks", "texts").spec.columns]


def test_a_stored_run_has_the_labels(run: Run) -> None:
    assert run.directory is not None
    stored = phaselens.open_run(run.directory)
    assert stored.to_dict() == run.to_dict()
    assert stored.texts == run.texts
    assert group_by_label(stored).to_dict() == group_by_label(run).to_dict()


def test_means_by_label_are_means_over_its_texts(run: Run) -> None:
    table = group_by_label(run).rows("sinks", "by_label")
    texts = run.rows("sinks", "texts").records()
    for record in table.records():
        if record["value"] != "score":
            continue
        values: dict[Any, list[Any]] = {}
        for row in texts:
            if all(row[name] == record[name] for name in ("model", "label", "layer")):
                values.setdefault(row["text"], []).append(row["score"])
        means = [np.mean(of_text) for of_text in values.values()]
        assert record["n_texts"] == len(means)
        assert record["mean"] == pytest.approx(np.mean(means), rel=1e-12)
        assert record["ci_low"] <= record["mean"] <= record["ci_high"]
    assert "by_label" not in run.metrics["sinks"].tables


def test_labels_stand_side_by_side_in_every_format(run: Run) -> None:
    grouped = group_by_label(run)
    tables = label_tables(grouped, "sinks", grouped.metrics["sinks"])
    assert [table.models for table in tables] == [["even", "odd | <b>"]] * 2
    assert [len(table.rows) for table in tables] == [2, 2]
    for name in run_formats():
        assert "by label, a: score" in written(grouped, name) or name == "json"
    assert "odd \\| &lt;b>" in written(grouped, "markdown")
    assert '"by_label"' in written(grouped, "json")


def test_a_comparison_by_label_is_that_of_its_texts(run: Run) -> None:
    comparison = phaselens.compare(run, by="label")
    even = [text for text in TEXTS if text.label == "even"]
    lenses = [toy_lens(seed=seed, label=label) for seed, label in ((0, "a"), (1, "b"))]
    direct = phaselens.compare(phaselens.run(lenses, metrics=["sinks"], texts=even))
    chosen = [r for r in comparison.differences.records() if (r["metric"], r["label"]) == ("sinks", "even")]
    for grouped, alone in zip(chosen, direct.differences.records(), strict=True):
        assert grouped["n_texts"] == alone["n_texts"] == 4
        assert grouped["difference"] == pytest.approx(alone["difference"], rel=1e-4, abs=1e-7)
    assert {r["label"] for r in comparison.differences.records()} == {"even", "odd | <b>"}
    assert {r["label"] for r in phaselens.compare(run).differences.records()} == {None}
    assert "; mean over texts; 2 more values with --format json or csv; even" in str(comparison)


def test_other_labels_are_refused_by_name(run: Run) -> None:
    changed_run = run.copy()
    changed_run.texts[0] = replace(changed_run.texts[0], label="other")
    phaselens.compare(run, changed_run, models=("a", "b"))
    with pytest.raises(InputError, match=r"labels: 1 texts have another label .* 't0' .--allow labels"):
        phaselens.compare(run, changed_run, models=("a", "b"), by="label")


def test_texts_without_labels_cannot_be_grouped() -> None:
    with pytest.raises(InputError, match="the run's texts have no labels to group them by"):
        group_by_label(unlabelled())
    with pytest.raises(InputError, match="by is 'text'; give 'label', or None"):
        phaselens.compare(unlabelled(), by="text")


@pytest.mark.slow
def test_texts_without_one_form_a_group(tmp_path: Path) -> None:
    texts = [TEXTS[0], Text("bare", letters(6))]
    run = phaselens.run(toy_lens(), metrics=["sinks"], texts=texts, out=tmp_path / "run")
    grouped = group_by_label(phaselens.open_run(tmp_path / "run"))
    assert {row["label"] for row in grouped.rows("sinks", "by_label").records()} == {"even", None}
    assert {row["ci_low"] for row in grouped.rows("sinks", "by_label").records()} == {None}
    assert "without a label" in written(grouped, "table")
    assert run.texts[1].label is None
