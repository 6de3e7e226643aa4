"""Runs in directories, in a few words: what they measure, and how far they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import phaselens
from phaselens.errors import InputError
from phaselens.runs import RunSummary, find_runs
from tests.runs.metrics import probe
from tests.toys import letters, toy_lens

TEXTS = [letters(5 + 3 * index, index) for index in range(4)]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "study"
    lenses = [toy_lens(seed=seed, label=label) for seed, label in ((0, "a"), (1, "b/x"))]
    phaselens.run(lenses, metrics=["sinks", "bos-mlp"], texts=TEXTS, shard_tokens=16, out=folder)
    return folder


@pytest.fixture
def interrupted(study: Path, tmp_path: Path) -> Path:
    """The run as it is before its results are written."""
    folder = tmp_path / "interrupted"
    shutil.copytree(study, folder)
    (folder / "result.json").unlink()
    return folder


@pytest.mark.slow
def test_a_complete_run_is_described(study: Path) -> None:
    summary = RunSummary.read(study)
    assert (summary.models, summary.metrics) == (("a", "b/x"), ("sinks", "bos-mlp"))
    assert (summary.n_texts, summary.texts, summary.state) == (4, "given", "complete")
    assert summary.started == json.loads((study / "run.json").read_text())["times"]["started"]
    assert json.dumps(summary.as_dict())


def test_the_shards_of_both_phases_are_counted(interrupted: Path) -> None:
    n_files = len([p for p in (interrupted / "shards").iterdir() if "-plan." not in p.name])
    assert n_files == 2 * 2 * 3
    assert RunSummary.read(interrupted).state == "12 of 12 shards"
    for path in interrupted.glob(
        "shards/1-b_x.conditions*"
    ):  # the second model's conditions are not planned yet
        path.unlink()
    (observed, *_) = sorted(interrupted.glob("shards/1-b_x.observations*"))
    observed.unlink()
    assert RunSummary.read(interrupted).state == "8 of 12 shards"


def test_prompts_count_once_they_are_planned(tmp_path: Path) -> None:
    phaselens.run(toy_lens(), metrics=["passkey"], texts=TEXTS[:1], out=tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    finished = [p for p in (tmp_path / "run" / "shards").iterdir() if "-plan." not in p.name]
    assert RunSummary.read(tmp_path / "run").state == f"{len(finished)} of {len(finished)} shards"


@pytest.mark.slow
def test_a_failed_metric_is_named(tmp_path: Path) -> None:
    def fail(metric: object, view: object) -> None:
        raise ValueError("no number")

    phaselens.run(toy_lens(), metrics=["sinks", probe(update=fail)], texts=TEXTS[:1], out=tmp_path / "run")
    assert RunSummary.read(tmp_path / "run").state == "failed: probe"


def test_runs_are_found_in_folders_of_folders(study: Path, tmp_path: Path) -> None:
    for name in ("b", "a/deep", ".hidden"):
        (tmp_path / name).mkdir(parents=True)
        shutil.copy(study / "run.json", tmp_path / name)
    (tmp_path / "link").symlink_to(study)
    assert find_runs([tmp_path]) == [tmp_path / "a" / "deep", tmp_path / "b"]
    assert find_runs([study, tmp_path / "b", tmp_path]) == [study, tmp_path / "b", tmp_path / "a" / "deep"]


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no run: neither it nor a folder below it has a run\.json"):
        find_runs([tmp_path])
    with pytest.raises(InputError, match="does not exist; name run directories"):
        find_runs([tmp_path / "missing"])
    with pytest.raises(InputError, match="expected paths as a list"):
        find_runs(str(tmp_path))
    with pytest.raises(InputError, match=r"holds no run\.json"):
        RunSummary.read(tmp_path)


def test_a_record_without_its_values_is_refused(interrupted: Path) -> None:
    record = json.loads((interrupted / "run.json").read_text())
    del record["options"]
    (interrupted / "run.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"run\.json' is incomplete: KeyError\('options'\)"):
        RunSummary.read(interrupted)
