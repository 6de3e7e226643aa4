"""Measure every ratio that has a goal, and write them to benchmarks/latest.json and docs/performance.md.

    python -m tools.bench [--only NAME …] [--rounds 3] [--page]

A ratio that is not measured now keeps its last value, with its date. `--page` measures nothing and writes the page.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.bench import peak, real, sinks, suite

ROOT = Path(__file__).resolve().parents[2]
LATEST, PAGE = ROOT / "benchmarks" / "latest.json", ROOT / "docs" / "performance.md"


@dataclass(frozen=True)
class Goal:
    """One number with its goal: `measure` takes the number of rounds; `reason`: why the goal is out of reach."""

    name: str
    unit: str
    goal: float
    script: str
    measure: Callable[[int], float]
    reason: str = ""


def ratio_of_fastest(measured: list[tuple[float, float]]) -> float:
    """Return the smallest first value over the smallest second: what else runs on the machine only adds to CPU time."""
    values, baselines = zip(*measured, strict=True)
    return float(min(values) / min(baselines))


def of_streams(variant: str, length: int, quantity: str) -> Callable[[int], float]:
    """Return a measure of one variant of `sinks.py` relative to its baseline."""

    def measure(rounds: int) -> float:
        measured = []
        # Memory hardly varies, and long texts take minutes.
        for _ in range(1 if quantity == "peak" else rounds):
            of_variant, baseline = (sinks.measure(name, length, 1) for name in (variant, "baseline"))
            if of_variant is None or baseline is None:
                raise RuntimeError(f"{variant} at {length} tokens failed")
            measured.append((of_variant[quantity], baseline[quantity]))
        return ratio_of_fastest(measured)

    return measure


def of_suite(length: int) -> Callable[[int], float]:
    """Return a measure of a run with all observational metrics relative to a bare forward."""

    def measure(rounds: int) -> float:
        measured = []
        for _ in range(rounds):
            of_all, baseline = (
                suite.measure_in_new_process(variant, length, 1, 2)["cpu"] for variant in ("all", "baseline")
            )
            measured.append((of_all, baseline))
        return ratio_of_fastest(measured)

    return measure


def of_real(name: str) -> Callable[[int], float]:
    """Return a measure of one run of `real.py` relative to bare forwards."""

    def measure(rounds: int) -> float:
        seconds = real.measure_runs([name], 12, 256, rounds)
        return seconds[name] / seconds["baseline"]

    return measure


def of_start(name: str) -> Callable[[int], float]:
    """Return a measure of the CPU seconds of a command on one short text."""
    return lambda rounds: real.measure_start(real.STARTS[name], rounds)[0]


def of_loading(variant: str, kind: str) -> Callable[[int], float]:
    """Return a measure of the resident or anonymous memory of loading, relative to the checkpoint."""

    def measure(rounds: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            peak.save(Path(folder), 500)
            return min(peak.measured(variant, Path(folder))[kind] for _ in range(rounds))

    return measure


BARE = "× bare forward, CPU"
MEMORY = "× bare forward, peak memory"
FIXED_COST = (
    "By the difference to 2,048 tokens, more than half of what is added does not depend on their number: eigenvalues "
    "of matrices of d_model × d_model in each layer, and the tables of 13 metrics, which a run builds once for all "
    "texts. That part alone would exceed the goal on one text."
)
START_COST = (
    "The largest part is imports, nearly all in torch, transformers and TransformerLens, which imports every "
    "architecture that it knows (`python -X importtime -m phaselens run rope -p sinks`); the sha256 of the "
    "weights, which the result records, is part of it, too."
)
CAUSAL_COST = (
    "A forward that finds the write layer (11 of 30), the baseline, and the condition and its three controls, which "
    "start above that layer: by their multiplications, with those of the losses, these are 4.5 bare forwards."
)
GOALS = [
    Goal("sinks, 4,096 tokens", BARE, 1.03, "sinks.py", of_streams("sink", 4096, "cpu")),
    Goal("all statistics, 4,096 tokens", BARE, 1.5, "sinks.py", of_streams("all", 4096, "cpu")),
    Goal("all metrics, 2,048 tokens", BARE, 1.8, "suite.py", of_suite(2048)),
    Goal("all metrics, 512 tokens", BARE, 1.5, "suite.py", of_suite(512), FIXED_COST),
    Goal("sinks, 16,384 tokens", MEMORY, 1.2, "sinks.py", of_streams("sink", 16384, "peak")),
    Goal("sinks, 32,768 tokens", MEMORY, 1.2, "sinks.py", of_streams("sink", 32768, "peak")),
    Goal("SmolLM2-135M: sinks", "× bare forwards with loss, CPU", 1.0, "real.py", of_real("sinks")),
    Goal(
        "SmolLM2-135M: bos-mlp",
        "× bare forwards with loss, CPU",
        4.0,
        "real.py",
        of_real("bos-mlp"),
        CAUSAL_COST,
    ),
    Goal(
        "SmolLM2-135M: start, one text", "CPU seconds", 6.0, "real.py", of_start("start smollm2"), START_COST
    ),
    Goal("bundled pair: start, one text", "CPU seconds", 6.0, "real.py", of_start("start pair")),
    Goal(
        "loading, float32", "× checkpoint, resident memory", 1.1, "peak.py", of_loading("float32", "resident")
    ),
    # Resident memory has the mapped pages of the file, which the system can drop, beside the weights in bfloat16.
    Goal(
        "loading float32 as bfloat16",
        "× checkpoint, memory without mapped files",
        1.1,
        "peak.py",
        of_loading("bfloat16", "anonymous"),
    ),
]


def machine() -> str:
    """Return the processor, the number of cores and of threads used."""
    model = next(
        (line.split(":", 1)[1].strip() for line in _cpu_lines() if line.startswith("model name")),
        platform.machine(),
    )
    return f"{model}, {os.cpu_count()} cores, one thread"


def _cpu_lines() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def table(results: dict[str, dict[str, Any]]) -> list[str]:
    """Return the rows of all goals as Markdown."""
    rows = ["| what | measured | goal | unit | script | when, on |", "|---|---|---|---|---|---|"]
    for goal in GOALS:
        result = results.get(goal.name)
        value = "not measured" if result is None else f"{result['value']:.2f}"
        when = "" if result is None else f"{result['date']}, {result['machine']}"
        met = "" if result is None or result["value"] <= goal.goal else " (missed)"
        rows.append(
            f"| {goal.name} | {value}{met} | {goal.goal:g} | {goal.unit} | `{goal.script}` | {when} |"
        )
    return rows


def reasons(results: dict[str, dict[str, Any]]) -> list[str]:
    """Return a paragraph for each missed goal that has a known reason, as Markdown."""
    return [
        line
        for goal in GOALS
        if goal.reason and results.get(goal.name, {"value": 0})["value"] > goal.goal
        for line in (f"**{goal.name}:** {goal.reason}", "")
    ]


def write_page(results: dict[str, dict[str, Any]]) -> None:
    """Write docs/performance.md."""
    PAGE.write_text(
        "\n".join([INTRODUCTION, *table(results), "", *reasons(results), GPU_NOTE, ""]), encoding="utf-8"
    )


INTRODUCTION = """# Performance

`make bench` measures these ratios, and writes this page and `benchmarks/latest.json`. Each script under `tools/bench`
says what it measures. CPU seconds are those of the process, on one thread: other work on the machine disturbs them less
than wall time, but by up to a third all the same. So each is measured several times, and the fastest counts. For
the ratios to a bare forward, glibc keeps the memory that is freed, on both sides (`sinks.py` says why).
"""
GPU_NOTE = """Nothing has run on a GPU yet. `tools/gpu/check.sh` runs the CUDA tests and `tools/bench/gpu.py` there.

## Models that are too large for one device

`--device-map auto` lets accelerate fill the GPUs, then the CPU, then the disk. `--device-map FILE.json` names the
device of each module:

```json title=map.json
{"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.layers.1": "disk",
 "model.norm": 0, "lm_head": 0}
```

Weights on the CPU beside a GPU, or on the disk, are loaded for each forward of their module. On one kind of device the
numbers are the same to the bit; the token embedding must stay on a device. With `--batch-tokens 1`, texts go through
one at a time."""


def main() -> int:
    """Measure, print the table, and write it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="ratios whose names begin so")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--page", action="store_true", help="write the page from the last measurements")
    options = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    if LATEST.exists():
        results = json.loads(LATEST.read_text(encoding="utf-8"))
    chosen = [] if options.page else GOALS
    if options.only:
        chosen = [goal for goal in chosen if any(goal.name.startswith(name) for name in options.only)]
    for goal in chosen:
        value = goal.measure(options.rounds)
        print(f"{goal.name:34}{value:8.2f}  goal {goal.goal:g} {goal.unit}", flush=True)
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        results[goal.name] = {
            "value": round(value, 3),
            "goal": goal.goal,
            "unit": goal.unit,
            "date": today,
            "machine": machine(),
        }
        LATEST.parent.mkdir(exist_ok=True)
        LATEST.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    write_page(results)
    print("\n".join(table(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
