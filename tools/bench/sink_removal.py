"""Measure what `sink-removal` costs in all layers with five shifts, relative to `bos-v`, which has one condition there.

    python tools/bench/sink_removal.py [--layers 12] [--tokens 512] [--width 256] [--rounds 5] [--cpu-time]

The variants run alternately in one process; the first round is not counted, and the medians are compared. All run
without controls.

    base     the losses of the unedited model, which a run computes once for all its metrics
    bos-v    the value at position 0 := 0 in all layers at once: one condition
    five     sink-removal with b = −inf, −4, −2, −1, 2 in all layers at once: five conditions, five forwards,
             the divergence of each, and the pass that reads the attention on the key
    sweep 1  bos-v in each layer alone
    sweep 5  sink-removal with the five shifts in each layer alone; all shifts of a layer share its kernels

`each` is the cost of one condition beyond `base`, in units of a condition of bos-v. The lines below the table state the
ratio of all five shifts to one condition of bos-v, and that of each shift. The former is about five times the latter:
after the lowest edited layer every shift has a residual stream of its own, so each needs a forward of its own. Only the
kernels of one layer, edited alone, serve all shifts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# The repository replaces this folder, whose files would hide standard modules of the same name.
sys.path[0] = str(Path(__file__).resolve().parents[2])

SHIFTS = "-inf,-4,-2,-1,2"
UNITS = {"five": "bos-v", "sweep 5": "sweep 1"}
"""The variant of bos-v that each one of sink-removal is compared with."""


def run_metric(lens: Any, ids: Any, metric_class: Any, **params: Any) -> int:
    """Run one metric with its conditions on one text, and return the number of conditions."""
    from phaselens.data import Text, TokenizedText
    from phaselens.runs import feed_losses, feed_metric

    metric = metric_class(lens.info, metric_class.Params.parse(params))
    text = TokenizedText(Text("bench", ""), tuple(ids[0].tolist()), ids.shape[1])
    if metric.hooks():
        feed_metric(lens, [text], metric, [[0]])
    feed_losses(lens, [text], metric, [[0]])
    return len(metric.losses.conditions)


def variants_of(lens: Any, ids: Any) -> dict[str, Callable[[], int]]:
    """Return the functions to time, by name; each returns its number of conditions."""
    from tools.bench.sweep import sweep_with_conditions

    from phaselens_plugins.bos_v import BosV
    from phaselens_plugins.sink_removal import SinkRemoval

    alone: dict[str, Any] = {"seeds": 0, "shifts": SHIFTS, "beside": False}
    return {
        "base": lambda: len(sweep_with_conditions(lens, ids, None)),
        "bos-v": lambda: run_metric(lens, ids, BosV, seeds=0),
        "five": lambda: run_metric(lens, ids, SinkRemoval, **alone),
        "sweep 1": lambda: run_metric(lens, ids, BosV, seeds=0, at="sweep"),
        "sweep 5": lambda: run_metric(lens, ids, SinkRemoval, **alone, at="layers"),
    }


def ratios(medians: Mapping[str, float], counts: Mapping[str, int], variant: str) -> tuple[float, float]:
    """Return the seconds of a variant over those of its unit, and those of one condition beyond the base over those of
    one condition of the unit.

    >>> ratios({"base": 1.0, "bos-v": 3.0, "five": 9.0}, {"bos-v": 1, "five": 5}, "five")
    (3.0, 0.8)
    """
    unit, base = UNITS[variant], medians["base"]
    of_each = (medians[variant] - base) / counts[variant] / ((medians[unit] - base) / counts[unit])
    return medians[variant] / medians[unit], of_each


def compare(n_layers: int, n_tokens: int, width: int, rounds: int, clock: Callable[[], float]) -> None:
    """Time all variants alternately, and print one line per variant."""
    import torch
    from tools.bench.sweep import build

    import phaselens

    lens = phaselens.load(build(n_layers, width), label="bench", check=False)
    ids = torch.randint(1, 2048, (1, n_tokens), generator=torch.Generator().manual_seed(0))
    variants = variants_of(lens, ids)
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    counts: dict[str, int] = {}
    for round_index in range(rounds + 1):
        for variant, work in variants.items():
            start = clock()
            counts[variant] = work()
            if round_index:
                times[variant].append(clock() - start)
    medians = {variant: statistics.median(seconds) for variant, seconds in times.items()}
    for variant, seconds in medians.items():
        line = f"{variant:10}{counts[variant]:>12}{seconds:>9.3f}"
        if variant in UNITS:
            of_all, of_each = ratios(medians, counts, variant)
            line += f"{of_all:>9.2f}{of_each:>9.2f}"
        print(line, flush=True)
    for variant, layers in (("five", "all layers at once"), ("sweep 5", "each layer alone")):
        of_all, of_each = ratios(medians, counts, variant)
        print(f"{layers}: five shifts cost {of_all:.2f} × bos-v, {of_each:.2f} × per shift beyond the base")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--width", type=int, default=256, help="d_model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true", help="seconds of this process, for a busy machine")
    options = parser.parse_args()

    import torch

    torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    print(f"{'variant':10}{'conditions':>12}{'seconds':>9}{'× bos-v':>9}{'each':>9}")
    compare(options.layers, options.tokens, options.width, options.rounds, clock)


if __name__ == "__main__":
    main()
