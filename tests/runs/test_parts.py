"""Parts of a run, computed in any order by separate calls, are merged to the same tables to the bit."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest

import phaselens
from phaselens.errors import InputError
from phaselens.runs import Observer, Run, merge
from phaselens.runs import run as measure
from phaselens.runs.parts import Part
from phaselens.runs.shard_store import WorkUnit
from phaselens.runs.shard_work import ShardWork
from phaselens.runs.shards import Shard
from tests.marks import mark_later_slow
from tests.runs.crews import OPTIONS, require_same_results, tables_of
from tests.toys import save_checkpoint, toy_lens


@pytest.fixture(scope="module")
def lens() -> Any:
    return toy_lens()


@pytest.fixture(scope="module")
def expected(lens: Any, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return measure(lens, out=tmp_path_factory.mktemp("parts") / "alone", **OPTIONS)


@pytest.mark.slow
@pytest.mark.parametrize("order", mark_later_slow([[3, 1, 2], [1], [2, 1], list(range(9, 0, -1))]))
def test_parts_in_any_order_are_merged_to_the_same_tables(
    lens: Any, expected: Run, tmp_path: Path, order: list[int]
) -> None:
    for number in order:
        part = measure(lens, out=tmp_path, shards=f"{number}/{len(order)}", **OPTIONS)
        assert not part.models
        assert part.warnings[-1].endswith(f"phaselens merge {tmp_path} makes the tables")
    require_same_results(merge(tmp_path), expected)
    assert tables_of(tmp_path) == tables_of(expected.directory or Path())
    require_same_results(merge(tmp_path), expected)


def test_observations_of_parts_are_those_of_the_part_alone(lens: Any, tmp_path: Path) -> None:
    options = {**OPTIONS, "metrics": ["sinks", "bos-norm"]}
    for number, n_computed in ((1, 2), (2, 2), (3, 1)):
        part = measure(lens, out=tmp_path, shards=f"{number}/3", **options)
        assert part.warnings[-1].startswith(f"part {number}/3: {n_computed} shards were computed")
    empty = measure(lens, out=tmp_path, shards="6/9", **options)
    assert empty.warnings[-1].startswith("part 6/9: 0 shards were computed")
    require_same_results(merge(tmp_path), measure(lens, **options))


@pytest.mark.slow
def test_phases_can_be_computed_by_one_array_each(lens: Any, expected: Run, tmp_path: Path) -> None:
    n_shards = []
    for phase, number in itertools.product(("observations", "conditions"), (1, 2)):
        part = measure(lens, out=tmp_path, shards=f"{number}/2", phase=phase, **OPTIONS)
        n_shards.append(int(part.warnings[-1].split()[2]))
    assert n_shards == [3, 2, 3, 2]
    require_same_results(merge(tmp_path), expected)


def test_missing_shards_are_named_or_left_out(lens: Any, tmp_path: Path) -> None:
    options = {**OPTIONS, "metrics": "sinks"}
    measure(lens, out=tmp_path, shards="1/2", **options)
    with pytest.raises(
        InputError, match=r"llama: 2 shards are missing \(observations: 1, 3\); run their parts"
    ):
        merge(tmp_path)
    run = merge(tmp_path, allow_missing=True)
    assert [shard.shard for shard in run.failed_shards] == [1, 3]
    assert "no part has computed it; 1 texts are missing: '1'" in str(run.failed_shards[0])
    assert {row["text"] for row in run.table("sinks", "texts").to_pylist()} == set("02567")
    measure(lens, out=tmp_path, shards="2/2", **options)
    require_same_results(merge(tmp_path), measure(lens, **options))
    assert (tmp_path / "incomplete-1" / "result.json").is_file()


@pytest.mark.slow
def test_conditions_that_no_part_has_begun_are_named(lens: Any, tmp_path: Path) -> None:
    measure(lens, out=tmp_path, shards="1/1", phase="observations", **OPTIONS)
    with pytest.raises(
        InputError, match="no part has begun the conditions of bos-mlp, qk-disruption; run the"
    ):
        merge(tmp_path)


def test_a_shard_that_fails_twice_is_recorded_for_the_merge(
    lens: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**OPTIONS, "metrics": "sinks"}
    observe, tries = ShardWork.observe, []

    def fail(self: ShardWork, shard: Any, active_metrics: Any) -> Any:
        if shard.index == 2:
            tries.append(shard.index)
            raise RuntimeError("the model's own fault")
        return observe(self, shard, active_metrics)

    monkeypatch.setattr(ShardWork, "observe", fail)
    (shard,) = measure(lens, out=tmp_path, shards="1/1", **options).failed_shards
    assert len(tries) == 2
    assert shard.reason == "it failed twice: RuntimeError: the model's own fault"
    run = merge(tmp_path)
    assert run.failed_shards == [shard]
    monkeypatch.setattr(ShardWork, "observe", observe)
    measure(lens, out=tmp_path, shards="1/1", **options)
    require_same_results(merge(tmp_path), measure(lens, **options))


class StartingAnother(Observer):
    """Computes another part in the middle of this one."""

    def __init__(self, start: Any) -> None:
        self.start = start

    def advance(self, n_tokens: int) -> None:
        start, self.start = self.start, None
        if start is not None:
            start()


@pytest.mark.slow
def test_parts_that_run_at_once_share_the_directory(lens: Any, expected: Run, tmp_path: Path) -> None:
    def start() -> None:
        measure(lens, out=tmp_path, shards="2/2", **OPTIONS)

    measure(lens, out=tmp_path, shards="1/2", observer=StartingAnother(start), **OPTIONS)
    require_same_results(merge(tmp_path), expected)


@pytest.mark.slow
def test_no_model_is_needed_for_merging(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "model")
    measure(str(source), out=tmp_path / "r", shards="1/1", **OPTIONS)
    expected = measure(str(source), **OPTIONS)
    shutil.rmtree(source)
    run = phaselens.merge(tmp_path / "r")
    require_same_results(run, expected)
    assert (tmp_path / "r" / "figures" / "sinks.png").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shards": "0/3"}, "--shards '0/3': write PART/PARTS, such as 3/8"),
        ({"shards": "4/3"}, "--shards '4/3'"),
        ({"shards": "3"}, "--shards '3'"),
        ({"shards": 3}, "--shards 3: write"),
        ({"shards": "1/2", "out": None}, "--shards needs a directory for the results of all; add --out DIR"),
        ({"phase": "observations"}, "--phase limits what a part computes; add --shards"),
        ({"phase": "observation", "shards": "1/2"}, "did you mean observations"),
        ({"workers": 0}, "expected workers as a whole number of at least 1"),
        ({"engine": "dask"}, "engine 'dask' is not known; known: processes, ray"),
        ({"address": "auto"}, "add --engine ray"),
        ({"threads": 0}, "threads is 0; give a whole number of at least 1"),
    ],
)
def test_choices_that_do_not_fit_are_refused(
    lens: Any, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        measure(lens, **{**OPTIONS, "out": tmp_path, **options})


def test_each_unit_belongs_to_one_part() -> None:
    for n_parts, model, owner in itertools.product((1, 2, 5), (0, 3), ("", "passkey")):
        parts = [Part(number, n_parts) for number in range(1, n_parts + 1)]
        for index in range(7):
            unit = WorkUnit("observations", Shard(index, (), (), 0), owner)
            assert sum(part.owns(unit, model) for part in parts) == 1
