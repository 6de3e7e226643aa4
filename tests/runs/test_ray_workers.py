"""Actors of a Ray cluster of two nodes give the same tables to the bit, also if one node is killed in the middle."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from phaselens.errors import InputError
from phaselens.runs import Observer, Run
from phaselens.runs import run as measure
from tests.runs.crews import OPTIONS, SlowProbe, require_same_results, tables_of
from tests.toys import save_checkpoint

SLOW_OPTIONS: dict[str, Any] = {**OPTIONS, "metrics": ["sinks", "bos-mlp", SlowProbe]}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_checkpoint(tmp_path_factory.mktemp("ray") / "tiny"))


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A cluster of two nodes on this machine, of which the second one can be removed."""
    pytest.importorskip("ray")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ray.cluster_utils import Cluster

        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        cluster.second = cluster.add_node(num_cpus=2)
        cluster.wait_for_nodes()
        yield cluster
        cluster.shutdown()


class KillingANode(threading.Thread):
    """Kills a node of a cluster as soon as some shards are there."""

    def __init__(self, cluster: Any, folder: Path, n_shards: int) -> None:
        super().__init__(daemon=True)
        self.cluster = cluster
        self.folder = folder
        self.n_shards = n_shards
        self.n_killed = 0

    def run(self) -> None:
        while len(list(self.folder.glob("shards/*.0*.safetensors"))) < self.n_shards:
            time.sleep(0.05)
        self.cluster.remove_node(self.cluster.second, allow_graceful=False)
        self.n_killed += 1


class CountingTokens(Observer):
    """Counts what was announced and what was read."""

    n_announced = 0
    n_read = 0

    def measuring(self, label: str, n_tokens: int) -> None:
        self.n_announced += n_tokens

    def advance(self, n_tokens: int) -> None:
        self.n_read += n_tokens


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers", [1, 3])
def test_actors_give_the_same_tables(source: str, tmp_path: Path, cluster: Any, workers: int) -> None:
    expected = measure(source, out=tmp_path / "alone", **OPTIONS)
    counts = CountingTokens()
    options = {**OPTIONS, "engine": "ray", "address": cluster.address, "observer": counts}
    run = measure(source, out=tmp_path / "r", workers=workers, **options)
    require_same_results(run, expected)
    assert tables_of(tmp_path / "r") == tables_of(tmp_path / "alone")
    assert counts.n_read == counts.n_announced > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_node_that_is_killed_in_the_middle_costs_no_shard(
    source: str, tmp_path: Path, cluster: Any
) -> None:
    expected: Run = measure(source, out=tmp_path / "alone", **SLOW_OPTIONS)
    killer = KillingANode(cluster, tmp_path / "r", 1)
    killer.start()
    run = measure(
        source, out=tmp_path / "r", workers=2, engine="ray", address=cluster.address, **SLOW_OPTIONS
    )
    assert killer.n_killed == 1
    require_same_results(run, expected)
    assert tables_of(tmp_path / "r") == tables_of(tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_models_that_differ_on_another_machine_are_refused(
    source: str, tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from phaselens.runs import resumable

    record_run = resumable.record_run

    def record_another(request: Any, *args: Any, **kwargs: Any) -> Any:
        request["models"]["tiny"]["files"]["model.safetensors"] = "0" * 64
        return record_run(request, *args, **kwargs)

    monkeypatch.setattr(resumable, "record_run", record_another)
    options = {**OPTIONS, "engine": "ray", "address": cluster.address}
    with pytest.raises(InputError, match=r"file model\.safetensors of model tiny has changed"):
        measure(source, out=tmp_path / "r", workers=1, **options)


def test_a_missing_ray_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"--engine ray needs Ray; pip install 'phaselens\[ray\]'"):
        measure("rope", metrics="sinks", engine="ray", out=tmp_path / "r")
    with pytest.raises(InputError, match="--engine ray needs a directory for the results of all"):
        measure("rope", metrics="sinks", engine="ray")
    assert not (tmp_path / "r").exists()


@pytest.mark.slow
def test_ray_is_imported_only_for_its_engine(source: str) -> None:
    code = (
        "import sys, phaselens, phaselens.cli\n"
        f"phaselens.run({source!r}, metrics='sinks', texts=['a b c'])\n"
        "assert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
