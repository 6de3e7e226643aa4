"""Processes on this machine: the same tables to the bit, replaced when they are killed, with shared weights."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

import phaselens
from phaselens.runs import Observer
from phaselens.runs import run as measure
from phaselens.runs.local_workers import environment, group_of_cores
from tests.runs.crews import OPTIONS, TEXTS, Deadly, SlowProbe, require_same_results, tables_of
from tests.toys import save_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_checkpoint(tmp_path_factory.mktemp("local") / "tiny"))


def worker_processes() -> list[psutil.Process]:
    return [
        process
        for process in psutil.Process().children()
        if "phaselens.runs.worker_process" in process.cmdline()
    ]


class KillingAWorker(Observer):
    """Kills one of the workers as soon as a token was read."""

    def __init__(self) -> None:
        self.n_killed = 0
        self.n_read = 0

    def advance(self, n_tokens: int) -> None:
        self.n_read += n_tokens
        if not self.n_killed:
            worker_processes()[0].send_signal(signal.SIGKILL)
            self.n_killed += 1


@pytest.mark.slow
def test_a_worker_that_is_killed_is_replaced(source: str, tmp_path: Path) -> None:
    options = {**OPTIONS, "metrics": ["sinks", "bos-mlp", SlowProbe]}
    expected = measure(source, out=tmp_path / "alone", **options)
    observer = KillingAWorker()
    run = measure(source, out=tmp_path / "r", workers=2, observer=observer, **options)
    assert observer.n_killed == 1
    require_same_results(run, expected)
    assert tables_of(tmp_path / "r") == tables_of(tmp_path / "alone")
    assert worker_processes() == []


@pytest.mark.slow
def test_a_shard_that_kills_its_worker_twice_is_reported(source: str, tmp_path: Path) -> None:
    options = {**OPTIONS, "metrics": ["sinks", Deadly]}
    run = measure(source, out=tmp_path / "r", workers=2, **options)
    (shard,) = run.failed_shards
    assert shard.texts == ("5",)
    assert shard.reason == "it failed twice: the worker ended by exit code 7: this text is deadly"
    assert {row["text"] for row in run.table("sinks", "texts").to_pylist()} == set("0123467")


@pytest.mark.slow
def test_more_threads_than_cores_give_the_same_numbers_in_every_process(source: str) -> None:
    options = {**OPTIONS, "metrics": "compression", "texts": TEXTS[:3], "threads": 3}
    run = measure(source, workers=2, **options)
    require_same_results(run, measure(source, **options))
    assert run.options["threads"] == 3


class LookingAtMemory(Observer):
    """Adds up the memory of each worker in which the model's file is mapped, and what of it is a copy."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.mapped: list[tuple[int, int]] = []

    def advance(self, n_tokens: int) -> None:
        for process in worker_processes():
            maps = [area for area in process.memory_maps() if area.path == str(self.file)]
            if maps:
                self.mapped.append((sum(area.rss for area in maps), sum(area.private_dirty for area in maps)))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux' maps of memory")
def test_weights_in_the_dtype_of_the_run_are_mapped_and_not_copied(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "tiny")
    file = (folder / "model.safetensors").resolve()
    observer = LookingAtMemory(file)
    measure(str(folder), workers=2, observer=observer, **{**OPTIONS, "metrics": ["sinks", SlowProbe]})
    assert observer.mapped
    assert all(mapped > 0 and copied == 0 for mapped, copied in observer.mapped)


def test_cores_are_split_into_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 2, 3, 5, 7}, raising=False)
    assert [group_of_cores(slot, 2) for slot in range(2)] == [[0, 2, 3], [5, 7]]
    assert [group_of_cores(slot, 5) for slot in range(5)] == [[0], [2], [3], [5], [7]]
    assert group_of_cores(0, 6) == []


def test_each_worker_sees_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def gpus(outer: dict[str, str], device: str = "auto") -> list[str | None]:
        return [environment(slot, device, outer).get("CUDA_VISIBLE_DEVICES") for slot in range(3)]

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert gpus({}) == ["0", "1", "0"]
    assert gpus({"CUDA_VISIBLE_DEVICES": "4,6"}) == ["4", "6", "4"]
    assert gpus({}, "cuda:1") == gpus({}, "cpu") == [None, None, None]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert gpus({}) == [None, None, None]
    assert environment(0, "cpu", {"OMP_WAIT_POLICY": "ACTIVE"})["OMP_WAIT_POLICY"] == "ACTIVE"


@pytest.mark.slow
def test_a_worker_that_cannot_start_ends_the_run_in_one_line(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "phaselens.runs.local_workers.environment", lambda *arguments: {"PYTHONHOME": "/nowhere"}
    )
    with pytest.raises(
        phaselens.PhaseLensError, match=r"no worker can start: the worker ended by exit code 1: "
    ):
        measure(source, workers=1, **OPTIONS)


@pytest.mark.slow
def test_a_run_of_another_number_of_threads_is_refused(source: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {**OPTIONS, "metrics": "sinks", "out": tmp_path / "r"}
    first = measure(source, threads=2, **options)
    assert first.options["threads"] == 2
    require_same_results(measure(source, **options), first)  # those of the record
    with pytest.raises(phaselens.InputError, match="--threads: 2, now 3"):
        measure(source, threads=3, **options)
