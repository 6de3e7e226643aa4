"""Plans of runs: their counts are those of the run, and a long run is announced."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

import phaselens
from phaselens.errors import InputError
from phaselens.lens.memory import PeakMemory, available_memory
from phaselens.runs import ModelPlan, Observer, RunOptions, RunPlan, plan, planning
from tests.runs.metrics import probe
from tests.toys import letters, toy_lens

TEXTS = [letters(5 + 3 * index, index) for index in range(6)]
OPTIONS = RunOptions(batch_tokens=32, shard_tokens=40)


def planned(metrics: Any, **options: Any) -> RunPlan:
    return plan(toy_lens(), metrics=metrics, texts=TEXTS, options=OPTIONS, **options)


@pytest.mark.slow
def test_texts_tokens_and_shards_are_those_of_the_run(tmp_path: Any) -> None:
    (model,) = planned(["sinks", "bos-mlp"]).models
    lens = toy_lens()
    run = phaselens.run(
        lens, metrics=["sinks", "bos-mlp"], texts=TEXTS, batch_tokens=32, shard_tokens=40, out=tmp_path / "r"
    )
    n_files = len(list((tmp_path / "r" / "shards").glob("*.observations.*")))
    assert (model.n_texts, model.n_tokens, model.n_shards) == (6, run.models[0].n_tokens, n_files)
    unedited, conditions = model.passes
    assert (unedited.name, conditions.name) == ("unedited model", "conditions")
    assert conditions.metrics == ("bos-mlp",)
    assert unedited.n_forwards == conditions.n_forwards >= model.n_shards
    assert conditions.n_conditions > 1 == unedited.n_conditions
    assert 0 < model.probe_tokens <= 32
    assert model.seconds == pytest.approx(
        model.load_seconds + unedited.seconds + conditions.seconds, rel=1e-9
    )


@pytest.mark.slow
def test_prompts_are_planned_from_one_batch_of_them() -> None:
    (model,) = plan("rope", metrics={"passkey": {"n": 2, "lengths": "96"}}, texts=["to be"]).models
    assert [step.name for step in model.passes] == ["prompts of passkey"]
    assert model.passes[0].n_texts > 0


def test_own_sequences_are_planned() -> None:
    (model,) = planned(["over-mixing"]).models
    assert "sequences of over-mixing" in [step.name for step in model.passes]


def test_a_metric_that_fails_on_the_probe_is_named() -> None:
    def fail(metric: object, view: object) -> None:
        raise ValueError("no number")

    (model,) = planned([probe(update=fail), "sinks"]).models
    assert model.failures[0].startswith("probe: ValueError in update on llama: no number")
    assert planned("sinks").as_dict()["models"][0]["failures"] == []


def test_wrong_options_are_refused() -> None:
    with pytest.raises(InputError, match="expected options as a RunOptions"):
        plan(toy_lens(), metrics="sinks", options={"n_texts": 3})  # type: ignore[arg-type]


class PlanListener(Observer):
    wants_plans = True

    def __init__(self) -> None:
        self.plans: list[ModelPlan] = []

    def planned(self, plan: ModelPlan) -> None:
        self.plans.append(plan)


@pytest.mark.slow
@pytest.mark.parametrize("keeps", [False, True])
def test_a_long_run_is_announced_and_measures_the_same(
    keeps: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet, listener = PlanListener(), PlanListener()
    options: dict[str, Any] = {"metrics": ["sinks", "bos-mlp"], "texts": TEXTS, "batch_tokens": 16}
    options["out"] = tmp_path / "a" if keeps else None
    plain = phaselens.run(toy_lens(), observer=quiet, **options)
    assert quiet.plans == []
    monkeypatch.setattr(planning, "_FEWEST_BATCHES", 2)
    monkeypatch.setattr(planning, "_LONG_SECONDS", 0.0)
    options["out"] = tmp_path / "b" if keeps else None
    announced = phaselens.run(toy_lens(), observer=listener, **options)
    assert [model.label for model in listener.plans] == ["llama"]
    assert announced.to_dict() == plain.to_dict()


def test_the_peak_of_memory_is_seen() -> None:
    device = torch.device("cpu")
    with PeakMemory(device) as before:
        time.sleep(0.01)
    with PeakMemory(device) as peak:
        block = torch.ones(320 * 2**20, dtype=torch.uint8)  # more than what is kept of freed tensors
        end = time.monotonic() + 10  # on a busy machine, its thread may have to wait for its turn
        while peak.n_bytes - before.n_bytes <= 160 * 2**20 and time.monotonic() < end:
            time.sleep(0.01)
        del block
    assert peak.n_bytes - before.n_bytes > 160 * 2**20
    assert available_memory(device) > before.n_bytes
