"""Any shards, in any order and through files, give the same tables; what cannot be merged is refused."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from phaselens.data import texts_from
from phaselens.plugin import (
    CausalMetric,
    Condition,
    LayerView,
    Plugins,
    Table,
    TaskPrompt,
    read_state,
    write_state,
)
from phaselens.runs import MetricResult, Observer, select_metrics
from phaselens.runs.engine import LoadedModel
from phaselens.runs.metric_factory import MetricFactory
from phaselens.runs.model_tables import tables_of_metrics
from phaselens.runs.shard_parts import ShardPart
from phaselens.runs.shard_store import ShardStore, WorkUnit
from phaselens.runs.shard_work import ShardWork
from phaselens.runs.shards import cut_shards
from phaselens.testing import tiny_lens
from phaselens.testing._checks import require_same
from tests.marks import mark_later_slow
from tests.plugins.test_knowledge import LETTERS, write
from tests.plugins.test_passkey import CONTRACT
from tests.runs.conditions import causal, zero
from tests.runs.metrics import Probe, probe
from tests.toys import letters, toy_lens

TEXTS = [letters(length, length) for length in (3, 17, 1, 8, 8, 30, 5, 12)]
OFF = zero("blocks.0.hook_mlp_out", 0)


class MemoryStore(ShardStore):
    """Keeps results in memory, as files hold them: by phase, prompts and number of the shard."""

    keeps = True

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.parts: dict[tuple[str, str, int], dict[str, ShardPart]] = {}

    def load(self, unit: WorkUnit) -> dict[str, ShardPart] | None:
        return self.parts.get((unit.phase, unit.texts_of, unit.shard.index))

    def save(self, unit: WorkUnit, parts: Mapping[str, ShardPart], seconds: float) -> None:
        key = (unit.phase, unit.texts_of, unit.shard.index)
        assert key not in self.parts
        self.parts[key] = {name: self.through_file(part) for name, part in parts.items()}

    def through_file(self, part: ShardPart) -> ShardPart:
        assert part.metric is None
        if self.folder is None or part.changed is None:
            return part
        path = self.folder / "state"
        write_state(path, part.changed, replace=True)
        return ShardPart(changed=read_state(path))


def shard_work(lens: Any, requests: Any, shard_tokens: int, store: ShardStore | None = None) -> Any:
    """The work on one model, and the results that receive failures."""
    selected = select_metrics(requests)
    results = {
        metric.name: MetricResult(metric.metric, metric.params, metric.distribution) for metric in selected
    }
    tokens = [lens.encoder().tokenize(text, 512) for text in texts_from(TEXTS)]
    factory = MetricFactory(lens.info, selected, seed=0, bos=lens.bos)
    shards = cut_shards(tokens, shard_tokens, 64)
    work = ShardWork(
        LoadedModel(lens, tokens), factory, shards, (shard_tokens, 64), observer=Observer(), store=store
    )
    return work, results


def run_work(work: ShardWork, results: Any) -> Any:
    active_metrics = work.construct(results)
    observes = any(active.points for active in active_metrics.values())
    return work.measure(active_metrics, results, observes=observes, unused=active_metrics)


def measure(lens: Any, requests: Any, shard_tokens: int, store: ShardStore | None = None) -> Any:
    """Tables by metric, warnings, and failures of one model."""
    work, results = shard_work(lens, requests, shard_tokens, store)
    tables, warnings = tables_of_metrics(run_work(work, results), results)
    return tables, warnings, [failure for result in results.values() for failure in result.failures]


def fill_in_random_order(lens: Any, requests: Any, shard_tokens: int, store: MemoryStore, seed: int) -> None:
    """Compute every shard of both phases in a random order, as many workers would."""
    work, results = shard_work(lens, requests, shard_tokens, store)
    shuffle = random.Random(seed)
    active_metrics = work.construct(results)
    on_texts = {}
    for name, active in active_metrics.items():
        if active.metric.reads_own_sequences():
            run_in_random_order(work.tasks.prepare_sequences([active]), work, store, shuffle)
        else:
            on_texts[name] = active
    observes = any(active.points for active in on_texts.values())
    for unit in shuffle.sample(work.units, len(work.units)) if observes else []:
        store.save(unit, work.observe(unit.shard, [work.new(name) for name in on_texts]), 0.0)
    metrics = {name: active.metric for name, active in active_metrics.items()}
    metrics |= work._observe_texts(list(on_texts), results, {}) if observes else {}
    causal_metrics = {name: metric for name, metric in metrics.items() if isinstance(metric, CausalMetric)}
    if causal_metrics:
        run_in_random_order(work.tasks.prepare_conditions(causal_metrics), work, store, shuffle)


def run_in_random_order(phase: Any, work: ShardWork, store: MemoryStore, shuffle: random.Random) -> None:
    for task in shuffle.sample(list(phase.tasks.values()), len(phase.tasks)):
        for unit in shuffle.sample(task.plan.units, len(task.shards)) if task.metrics else []:
            store.save(unit, work.run_shard(task, unit.shard, task.metrics), 0.0)


def require_equal(tables: Any, expected: Any, *, exact: bool) -> None:
    assert tables.keys() == expected.keys()
    for name in expected:
        require_same(tables[name], expected[name], name, exact=exact)


def requests_of(name: str, folder: Path) -> Any:
    needed: dict[str, Any] = {"passkey": CONTRACT, "knowledge": {"file": write(folder, LETTERS)}}
    return {name: needed.get(name, {})}


@pytest.fixture(scope="module")
def lens() -> Any:
    return tiny_lens("mistral", dtype=torch.float64)


BUILT_IN = [plugin.name for plugin in Plugins().registered if plugin.distribution == "phaselens"]


@pytest.mark.slow
@pytest.mark.parametrize("name", mark_later_slow(BUILT_IN))
def test_a_built_in_metric_gives_the_same_tables_for_any_shards(lens: Any, name: str, tmp_path: Path) -> None:
    requests = requests_of(name, tmp_path)
    unsharded, whole_warnings, failures = measure(lens, requests, 1 << 20)
    assert not failures
    sharded, sharded_warnings, failures = measure(lens, requests, 40)
    assert not failures
    require_equal(sharded, unsharded, exact=False)
    assert sorted(sharded_warnings) == sorted(whole_warnings)
    store = MemoryStore(tmp_path)
    first, first_warnings, _ = measure(lens, requests, 40, store)
    require_equal(first, sharded, exact=True)
    assert first_warnings == sharded_warnings
    n_shards = len(store.parts)
    again, again_warnings, _ = measure(lens, requests, 40, store)
    assert len(store.parts) == n_shards > 2
    require_equal(again, sharded, exact=True)
    assert again_warnings == sharded_warnings
    in_one_shard, _, _ = measure(lens, requests, 1 << 20, MemoryStore(tmp_path))
    require_equal(in_one_shard, unsharded, exact=True)
    shuffled = MemoryStore(tmp_path)
    fill_in_random_order(lens, requests, 40, shuffled, seed=1)
    assert len(shuffled.parts) == n_shards
    merged, merged_warnings, _ = measure(lens, requests, 40, shuffled)
    require_equal(merged, sharded, exact=True)
    assert merged_warnings == sharded_warnings


class Counting(Probe):
    """A metric that counts layers in an attribute."""

    name = "counting"

    def setup(self) -> None:
        self.total = 0

    def update(self, layer: LayerView) -> None:
        super().update(layer)
        self.total += layer.batch.n

    def compute(self) -> Mapping[str, Table]:
        return {"summary": self.table("summary", [(self.total,)])}


class Merging(Counting):
    """A metric that merges its count too."""

    name = "merging"

    def merge(self, other: Any) -> None:
        super().merge(other)
        self.total += other.total


def test_a_value_that_merge_leaves_out_is_refused_by_name() -> None:
    lens = toy_lens()
    (row,) = measure(lens, Counting, 1 << 20)[0]["counting"]["summary"].rows
    tables, _, (failure,) = measure(lens, Counting, 20)
    assert tables == {}
    assert (failure.stage, failure.type) == ("merge", "TypeError")
    assert "Counting collects values in total, which its merge leaves out" in failure.message
    assert measure(lens, Merging, 20)[0]["merging"]["summary"].rows == [row]


@pytest.mark.slow
def test_a_metric_that_fails_in_one_shard_is_dropped_and_the_others_go_on() -> None:
    lens, updates = toy_lens(), []

    def fails_on_short_texts(self: Any, layer: LayerView) -> None:
        updates.append(layer.batch.texts)
        if min(layer.batch.lengths) < 10:
            raise ValueError(f"too short: {min(layer.batch.lengths)}")
        Probe.update(self, layer)

    requests = [probe(name="failing", update=fails_on_short_texts), "bos-norm"]
    for store in (None, MemoryStore()):
        updates.clear()
        tables, _, (failure,) = measure(lens, requests, 20, store)
        assert list(tables) == ["bos-norm"]
        assert (failure.stage, failure.message) == ("update", "too short: 9")
        n_updates = len(updates)
        assert measure(lens, requests, 20, store)[2][0].message == "too short: 9"
        assert len(updates) == n_updates * (2 if store is None else 1)


def test_a_state_that_cannot_be_stored_fails_the_metric_only_where_it_must_be_stored() -> None:
    def setup(self: Any) -> None:
        self.function = print

    metric, lens = probe(setup=setup), toy_lens()
    for shard_tokens in (1 << 20, 20):
        assert not measure(lens, metric, shard_tokens)[2]
    _, _, (failure,) = measure(lens, metric, 20, MemoryStore())
    assert failure.stage == "state"
    assert "Probe.function is a builtin_function_or_method" in failure.message


@pytest.mark.slow
def test_conditions_are_chosen_once_from_all_texts() -> None:
    """What `conditions` stores reaches the tables, although `merge` knows nothing of it."""
    calls: list[int] = []

    def conditions(self: Any) -> list[Condition]:
        calls.append(len(self.per_text.texts))
        self.chosen = self.per_text.stack("mean").shape[0]
        return [OFF]

    def compute(self: Any) -> Any:
        return {**type(self).__mro__[1].compute(self), "summary": self.table("summary", [(self.chosen,)])}

    metric = causal(
        conditions=conditions, hooks=Probe.hooks, points=Probe.points, calls=[], update=Probe.update, compute=compute,
        tables=(*causal().tables, Probe.tables[1]),
    )  # fmt: skip
    for store in (None, MemoryStore()):
        tables, _, failures = measure(toy_lens(), metric, 20, store)
        assert not failures
        assert tables["causal"]["summary"].rows == [(len(TEXTS),)]
    assert calls == [len(TEXTS)] * 2


def test_what_record_keeps_in_a_new_attribute_does_not_reach_the_next_shard() -> None:
    """Each shard starts from the state after the conditions were chosen, whatever ran before it."""
    sums: list[float] = []

    def record(self: Any, condition: Condition, outcome: Any) -> None:
        type(self).__mro__[1].record(self, condition, outcome)
        self.running = getattr(self, "running", 0.0) + float(outcome.loss.sum())
        sums.append(self.running)

    metric = causal(OFF, record=record)
    tables, _, (failure,) = measure(toy_lens(), metric, 20)
    assert not tables
    assert "collects values in running, which its merge leaves out" in failure.message
    assert sorted(sums) != sums


def test_prompts_are_sharded_by_their_content() -> None:
    prompts = [TaskPrompt(f"p{length}", [0, *range(3, 3 + length)]) for length in (4, 9, 2, 7)]
    calls: list[int] = []

    def made(self: Any, tokenizer: Any) -> list[TaskPrompt]:
        calls.append(1)
        return prompts

    metric = causal(OFF, prompts=made)
    unsharded, _, _ = measure(toy_lens(), metric, 1 << 20)
    store = MemoryStore()
    sharded, _, failures = measure(toy_lens(), metric, 10, store)
    assert not failures
    assert len(calls) == 2
    assert {key[1] for key in store.parts} == {"causal"}
    assert len(store.parts) == 3
    pairs = zip(unsharded["causal"]["texts"].records(), sharded["causal"]["texts"].records(), strict=True)
    for record, twin in pairs:
        assert np.isclose(record.pop("loss"), twin.pop("loss"), rtol=1e-6)
        assert record == twin
