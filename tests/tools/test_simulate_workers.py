"""The simulation of many workers, on runs whose time is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tools.simulate_workers import Times, main, read_times, simulate, table

EQUAL = Times([[2.0] * 8], start=3.0, prepare=0.0, merge=1.0, dispatch=0.0)


def test_one_worker_takes_the_sum() -> None:
    run = simulate(EQUAL, 1)
    assert run.seconds == pytest.approx(3 + 8 * 2 + 1)
    assert run.wait == pytest.approx(0)
    assert run.limit == "computing"


@pytest.mark.parametrize(("n_workers", "seconds"), [(2, 12), (4, 8), (8, 6), (100, 6), (3, 10)])
def test_shards_that_are_equal_take_whole_rounds(n_workers: int, seconds: float) -> None:
    assert simulate(EQUAL, n_workers).seconds == pytest.approx(seconds)


def test_the_longest_shard_is_the_limit_of_many_workers() -> None:
    times = Times([[30.0, *[1.0] * 20]], start=1.0, prepare=0.0, merge=1.0, dispatch=0.0)
    assert simulate(times, 1000).seconds == pytest.approx(32)
    assert simulate(times, 1000).limit == "waiting for the last shard"


def test_conditions_are_prepared_by_one_worker_and_then_by_each() -> None:
    times = Times([[1.0] * 4, [2.0] * 4], start=0.0, prepare=5.0, merge=0.0, dispatch=0.0)
    assert simulate(times, 1).seconds == pytest.approx(4 + 5 + 8)
    assert simulate(times, 4).seconds == pytest.approx(1 + 5 + 5 + 2)
    assert simulate(times, 4).limit == "preparing conditions"


def test_more_texts_are_more_shards_and_more_to_merge() -> None:
    repeated = EQUAL.repeated(10)
    assert simulate(repeated, 1).seconds == pytest.approx(3 + 160 + 10)
    assert table(repeated, [1, 1000]).count("\n") == 3


def test_the_times_of_a_run_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "times").mkdir()

    def write(name: str, **values: object) -> None:
        (tmp_path / name).write_text(json.dumps(values))

    with pytest.raises(SystemExit, match="has no times of workers"):
        read_times(tmp_path)
    for phase, shard, seconds in (("observations", 1, 1.0), ("observations", 0, 2.0), ("conditions", 0, 4.0)):
        name = f"times/0-a.{phase}.{shard}.json"
        write(name, model="a", phase=phase, texts_of="", shard=shard, seconds=seconds)
    write("times/start.a.host.1.json", event="start", model="a", seconds=3.0)
    write("times/prepare-conditions.a.host.1.json", event="prepare-conditions", model="a", seconds=0.5)
    write("result.json", times={"merge_seconds": 0.25})
    assert read_times(tmp_path) == Times([[2.0, 1.0], [4.0]], 3.0, 0.5, 0.25)
    main([str(tmp_path), "--repeat", "3", "--workers", "1", "2"])
    assert capsys.readouterr().out.startswith("6 + 3 shards of 1.00 to 4.00 s; start-up 3.0 s;")
