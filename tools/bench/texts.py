"""Measure seconds and peak memory of a run by the number of texts: both must grow by the texts alone.

    python tools/bench/texts.py [--texts 1000 10000 100000] [--metrics sinks]

Every measurement runs in a new process, on a tiny random model and texts of two to nine tokens, so that what is
measured is the bookkeeping by text. The last columns are relative to the smallest number of texts.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# The repository replaces this folder, whose files would hide standard modules of the same name.
sys.path[0] = str(Path(__file__).resolve().parents[2])


def measure_texts(n_texts: int, metrics: Sequence[str]) -> None:
    """Run the metrics on so many texts, and print CPU seconds and the growth of this process' peak memory, as JSON."""
    import phaselens
    from phaselens.testing import tiny_lens

    lens = tiny_lens("llama")
    words = ["to be", "or not", "to be or not", "to do it", "be"]
    texts = [f"{words[index % 5]} {words[index // 5 % 5]}" for index in range(n_texts)]
    phaselens.run(lens, metrics=list(metrics), texts=texts[:10])
    peak_before, used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    run = phaselens.run(lens, metrics=list(metrics), texts=texts)
    seconds = time.process_time() - used
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_before
    if run.failed:
        raise RuntimeError(str(run))
    print(json.dumps({"seconds": seconds, "peak": peak / 2**10}))


def main() -> None:
    """Print one row per number of texts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--texts", type=int, nargs="+", default=[1000, 10000, 100000], help="numbers of texts"
    )
    parser.add_argument("--metrics", nargs="+", default=["sinks"], help="metrics, measured together")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure_texts(options.texts[0], options.metrics)
        return
    print(f"{'texts':>9}{'CPU s':>9}{'peak MB':>9}{'texts ×':>9}{'CPU ×':>9}", flush=True)
    base: dict[str, float] = {}
    for n_texts in options.texts:
        command = [sys.executable, __file__, "--one", "--texts", str(n_texts), "--metrics", *options.metrics]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        base = base or {"texts": n_texts, "seconds": row["seconds"]}
        print(
            f"{n_texts:9,}{row['seconds']:9.2f}{row['peak']:9.0f}"
            f"{n_texts / base['texts']:9.1f}{row['seconds'] / base['seconds']:9.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
