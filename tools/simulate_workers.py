"""Simulates a run on 1 to 1,000 workers, from the times of a run that was measured with workers.

    python -m tools.simulate_workers DIR                 the run in DIR (phaselens run … --workers N --out DIR)
    python -m tools.simulate_workers DIR --repeat 100    a run of the same kind with 100 times the texts

The simulation follows what the code does. Each worker starts and loads the model, then takes the next shard as soon as
it is free, longest texts first. Before the conditions, one worker merges the observations and chooses the conditions,
and then every worker that runs some does the same. In the end one process merges all shards into tables. It prints the
time, the speed-up over one worker, and what the time consists of on the worker that ends last.
"""

from __future__ import annotations

import argparse
import heapq
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000)


@dataclass(frozen=True)
class Times:
    """What was measured on one run, in seconds.

    Attributes:
        phases: the seconds of each shard, by phase, in the order in which they are handed out.
        start: until a worker has loaded the model.
        prepare: until a worker has merged the observations and chosen the conditions.
        merge: until all shards are merged and the tables are made.
        dispatch: between the end of a shard and the begin of the next one on the same worker.
    """

    phases: Sequence[Sequence[float]]
    start: float
    prepare: float
    merge: float
    dispatch: float = 0.002

    def repeated(self, n: int) -> Times:
        """Return the times of a run with n times the texts: n times the shards, and n times as much to merge."""
        phases = [[seconds for seconds in phase for _ in range(n)] for phase in self.phases]
        return replace(self, phases=phases, prepare=self.prepare * n, merge=self.merge * n)


@dataclass(frozen=True)
class Simulation:
    """A simulated run: its seconds, and what they consist of on the worker that ends last."""

    n_workers: int
    start: float
    compute: float
    wait: float
    prepare: float
    merge: float

    @property
    def seconds(self) -> float:
        """Seconds from the begin to the tables."""
        return self.start + self.compute + self.wait + self.prepare + self.merge

    @property
    def limit(self) -> str:
        """What most of the time that more workers would not save is spent on."""
        overheads = {
            "start-up": self.start,
            "waiting for the last shard": self.wait,
            "preparing conditions": self.prepare,
            "merging": self.merge,
        }
        name, seconds = max(overheads.items(), key=lambda item: item[1])
        return name if seconds > self.compute else "computing"


def read_times(path: Path) -> Times:
    """Read the times of a run in a directory; SystemExit if it was not measured with workers."""
    events: dict[str, list[float]] = {}
    phases: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for file in sorted((path / "times").glob("*.json")):
        times = json.loads(file.read_text())
        if "event" in times:
            events.setdefault(times["event"], []).append(times["seconds"])
        else:
            phases.setdefault((times["model"], times["phase"], times["texts_of"]), []).append(times)
    result = json.loads((path / "result.json").read_text()) if (path / "result.json").is_file() else {}
    merge = result.get("times", {}).get("merge_seconds")
    if not phases or "start" not in events or merge is None:
        raise SystemExit(
            f"{path} has no times of workers; measure with: phaselens run … --workers 2 --out DIR"
        )
    ordered = [
        [times["seconds"] for times in sorted(shards, key=lambda times: int(times["shard"]))]
        for _, shards in sorted(phases.items(), key=lambda item: (item[0][0], item[0][1] == "conditions"))
    ]
    prepare = events.get("prepare-conditions", [0.0])
    return Times(ordered, statistics.median(events["start"]), statistics.median(prepare), merge)


def simulate(times: Times, n_workers: int) -> Simulation:
    """Simulate the run on that many workers."""
    useful = min(n_workers, max(map(len, times.phases)))
    clock, compute, prepare = times.start, 0.0, 0.0
    for number, shards in enumerate(times.phases):
        if number % 2 and times.prepare:  # conditions: chosen by one worker, then by each of the others
            clock += times.prepare * (2 if useful > 1 else 1)
            prepare += times.prepare * (2 if useful > 1 else 1)
        free = [clock] * useful
        heapq.heapify(free)
        for seconds in shards:
            heapq.heappush(free, heapq.heappop(free) + seconds + times.dispatch)
        clock = max(free)
        compute += sum(shards) / useful
    wait = clock - times.start - prepare - compute
    return Simulation(n_workers, times.start, compute, wait, prepare, times.merge)


def table(times: Times, counts: Sequence[int]) -> str:
    """Return the simulated runs as a Markdown table."""
    alone = simulate(times, 1).seconds
    lines = [
        "| workers | seconds | speed-up | start-up | computing | waiting | preparing | merging | mostly |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for count in counts:
        run = simulate(times, count)
        parts = (run.start, run.compute, run.wait, run.prepare, run.merge)
        cells = " | ".join(f"{seconds:,.1f}" for seconds in parts)
        lines.append(
            f"| {count:,} | {run.seconds:,.1f} | {alone / run.seconds:,.1f} | {cells} | {run.limit} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table for the run in a directory."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, help="a run that was measured with workers")
    parser.add_argument(
        "--repeat", type=int, default=1, metavar="N", help="simulate a run with N times the texts"
    )
    parser.add_argument(
        "--workers", type=int, nargs="+", default=COUNTS, metavar="N", help="numbers of workers"
    )
    options = parser.parse_args(arguments)
    times = read_times(options.directory)
    repeated = times.repeated(options.repeat)
    n_shards = " + ".join(str(len(phase)) for phase in repeated.phases)
    shard_times = [seconds for phase in times.phases for seconds in phase]
    print(
        f"{n_shards} shards of {min(shard_times):.2f} to {max(shard_times):.2f} s; start-up {times.start:.1f} s; "
        f"preparing conditions {times.prepare:.2f} s and merging {times.merge:.2f} s for the measured texts\n"
    )
    print(table(repeated, options.workers))


if __name__ == "__main__":
    main(sys.argv[1:])
