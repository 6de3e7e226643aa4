"""Workers give the same tables to the bit, however many they are and however they end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import phaselens
from phaselens.errors import InputError, PhaseLensError
from phaselens.runs import Run, merge, open_run
from phaselens.runs import run as measure
from phaselens.runs.distribution import Distribution
from phaselens.runs.worker_job import Order, WorkerJob
from phaselens.runs.workers import Report
from tests.marks import mark_later_slow
from tests.plugins.test_knowledge import LETTERS, write
from tests.runs.crews import OPTIONS, TEXTS, WorkersInside, require_same_results, tables_of
from tests.runs.metrics import probe
from tests.toys import save_checkpoint, toy_lens

Inside = Callable[..., list[WorkersInside]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_checkpoint(tmp_path_factory.mktemp("workers") / "tiny"))


@pytest.fixture(scope="module")
def expected(source: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return measure(source, out=tmp_path_factory.mktemp("workers") / "alone", **OPTIONS)


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> Inside:
    """A function that makes runs use workers of this process, and returns a list of the groups that were made."""

    def install(fails: Callable[[Order, int], str] = lambda order, n: "") -> list[WorkersInside]:
        groups: list[WorkersInside] = []

        def make(self: Distribution, job: WorkerJob) -> WorkersInside:
            groups.append(WorkersInside(job, self.workers or 1, fails))
            return groups[-1]

        monkeypatch.setattr(Distribution, "_workers", make)
        return groups

    return install


@pytest.mark.slow
@pytest.mark.parametrize("workers", mark_later_slow([3, 1, 2, 9]))
def test_any_number_of_workers_gives_the_same_tables(
    source: str, expected: Run, tmp_path: Path, inside: Inside, workers: int
) -> None:
    groups = inside()
    run = measure(source, out=tmp_path / "r", workers=workers, **OPTIONS)
    require_same_results(run, expected)
    assert tables_of(tmp_path / "r") == tables_of(expected.directory or Path())
    (group,) = groups
    assert len(group.started) == min(workers, 5)  # there are five shards
    orders = [order[:4] for _, order in group.orders]
    assert (
        len(orders) == len(set(orders)) == 5 + 1 + 5
    )  # observations, the plan of the conditions, conditions
    assert group.n_workers == 0
    again = measure(source, out=tmp_path / "r", workers=workers, **OPTIONS)
    require_same_results(again, expected)
    assert len(groups) == 1


@pytest.mark.slow
def test_workers_without_a_directory_leave_nothing(source: str, expected: Run, inside: Inside) -> None:
    (groups, run) = (inside(), measure(source, workers=2, **OPTIONS))
    require_same_results(run, expected)
    assert run.directory is None
    assert not Path(groups[0].job.out).exists()


@pytest.mark.slow
def test_a_worker_that_ends_is_replaced_and_its_shard_is_computed_again(
    source: str, expected: Run, tmp_path: Path, inside: Inside
) -> None:
    groups = inside(lambda order, n: "ended" if n == 0 and order.shard in (0, 3, None) else "")
    require_same_results(measure(source, out=tmp_path / "r", workers=2, **OPTIONS), expected)
    assert len(groups[0].started) == 2 + 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "outcome"), mark_later_slow([("observations", "ended"), ("conditions", "failed")])
)
def test_a_shard_that_fails_twice_is_reported_and_the_others_are_merged(
    source: str, expected: Run, tmp_path: Path, inside: Inside, phase: str, outcome: str
) -> None:
    groups = inside(lambda order, n: outcome if order.phase == phase and order.shard == 1 else "")
    run = measure(source, out=tmp_path / "r", workers=2, **OPTIONS)
    (shard,) = run.failed_shards
    assert (shard.model, shard.phase, shard.shard, shard.texts) == ("tiny", phase, 1, ("1",))
    assert str(shard) == (
        f"tiny: shard 1 ({phase}) was not computed: it failed twice: it {outcome} on purpose; 1 texts are missing: '1'"
    )
    assert not run.failed
    texts = {row["text"] for row in run.table("sinks", "texts").to_pylist()}
    assert texts == {str(index) for index in range(8)} - ({"1"} if phase == "observations" else set())
    causal_texts = {row["text"] for row in run.table("bos-mlp", "texts").to_pylist()}
    assert causal_texts == {str(index) for index in range(8)} - {"1"}
    assert open_run(tmp_path / "r").failed_shards == run.failed_shards
    assert open_run(tmp_path / "r").to_dict() == run.to_dict()
    if phase == "observations":
        assert all(order.shard != 1 for _, order in groups[0].orders if order.phase == "conditions")
    inside()  # the same command tries again, and replaces nothing
    kept = tables_of(tmp_path / "r")
    require_same_results(measure(source, out=tmp_path / "r", workers=2, **OPTIONS), expected)
    assert tables_of(tmp_path / "r" / "incomplete-1") == kept
    assert tables_of(tmp_path / "r") == tables_of(expected.directory or Path())


@pytest.mark.slow
def test_fewer_texts_than_workers_and_models_one_after_the_other(source: str, inside: Inside) -> None:
    groups = inside()
    options = {**OPTIONS, "texts": TEXTS[:1]}
    models = [f"a={source}", f"b={source}"]
    require_same_results(measure(models, workers=3, **options), measure(models, **options))
    assert len(groups[0].started) == 1


@pytest.mark.slow
def test_sequences_and_prompts_of_metrics_are_distributed_too(
    source: str, tmp_path: Path, inside: Inside
) -> None:
    metrics = {"over-mixing": {}, "sinks": {}, "knowledge": {"file": write(tmp_path, LETTERS)}}
    options = {**OPTIONS, "metrics": metrics, "texts": TEXTS[:3]}
    groups, expected = inside(), measure(source, **options)
    assert not expected.failed
    require_same_results(measure(source, workers=2, **options), expected)
    assert {order.texts_of for _, order in groups[0].orders} == {"", "over-mixing", "knowledge"}
    for number in (2, 1):
        measure(source, out=tmp_path / "r", shards=f"{number}/2", **options)
    require_same_results(merge(tmp_path / "r"), expected)


@pytest.mark.slow
def test_what_ends_every_worker_ends_the_run(
    source: str, tmp_path: Path, inside: Inside, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside()
    monkeypatch.setattr(
        WorkersInside, "wait", lambda self: Report(0, "refused", text="no weights", error="ModelError")
    )
    with pytest.raises(phaselens.ModelError, match="no weights"):
        measure(source, out=tmp_path / "r", workers=2, **OPTIONS)
    monkeypatch.setattr(WorkersInside, "start", lambda self: len(self.reports))
    monkeypatch.setattr(WorkersInside, "wait", lambda self: Report(0, "ended", text="exit code 1: no torch"))
    with pytest.raises(PhaseLensError, match="no worker can start: exit code 1: no torch"):
        measure(source, out=tmp_path / "r", workers=1, **OPTIONS)


def test_lenses_and_metrics_that_no_other_process_can_make_are_refused(source: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="workers load the models themselves"):
        measure(toy_lens(), workers=2, **OPTIONS)
    with pytest.raises(InputError, match="which another process cannot import"):
        measure(source, out=tmp_path, workers=1, **{**OPTIONS, "metrics": probe(name="local")})
    assert not list(tmp_path.iterdir())
