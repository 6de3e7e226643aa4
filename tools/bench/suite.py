"""What the metrics cost: seconds and peak memory of one pass, against the bare model's forward.

    python tools/bench/suite.py [--lengths 512 2048] [--rounds 5] [--threads 1]

Every measurement is a fresh process, so that peak memory is that way's own; the ways take turns, round by round, so
that a drifting machine drifts for all of them. The model is that of `sinks.py`, with one row made massive (as trained
models have one), so that `compression` takes it out of its spectra.

    bare       Hugging Face, SDPA, no unembedding            the baseline
    lens       the lens, nothing hooked
    all        a run with all observational metrics
    NAME       a run with that metric alone
    spectrum   the matrix entropy of all layers' residuals, by itself: no forward in it
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
from typing import Any

# In place of this folder, whose files would hide standard modules of the same name.
sys.path[0] = str(Path(__file__).resolve().parents[2])

WAYS = ("bare", "lens", "all", "spectrum")
METRICS = (
    "attention-patterns",
    "bos-norm",
    "bos-write",
    "compression",
    "layer-balance",
    "massive-activations",
    "massive-values",
    "sinks",
)
"""The metrics that only observe: they share one forward. Those that intervene take forwards of their own."""


def spiked_model() -> Any:
    """The random Llama, whose first token gets a large embedding: a massive row from the first layer on."""
    import torch
    from tools.bench.sinks import build

    model = build()
    with torch.no_grad():
        model.model.embed_tokens.weight[0] *= 3000
    return model


def work_of(way: str, length: int) -> Any:
    """A function that does it once."""
    import torch

    model = spiked_model()
    ids = torch.randint(1, 2048, (length,), generator=torch.Generator().manual_seed(0))
    ids[0] = 0
    if way == "bare":

        def bare() -> None:
            with torch.no_grad():
                model.base_model(ids[None], use_cache=False)

        return bare
    import phaselens

    lens = phaselens.load(model, label="bench", check=False)
    if way == "lens":
        return lambda: lens.stream(ids[None])
    if way == "spectrum":
        return _spectra(lens, ids)
    lens.text_tokenizer = _Numbers()
    return lambda: _run(lens, ids.tolist(), METRICS if way == "all" else [way])


class _Numbers:
    """Spells token ids as numbers."""

    def convert_ids_to_tokens(self, token: int) -> str:
        return str(token)


def _spectra(lens: Any, ids: Any) -> Any:
    from phaselens.spectrum import massive_rows, row_norms, spectra

    kept: list[Any] = []
    points = [
        (f"blocks.{layer}.hook_resid_post", lambda x, hook: kept.append(x[0].clone())) for layer in range(8)
    ]
    lens.stream(ids[None], points)
    return lambda: [spectra(x, massive_rows(row_norms(x))) for x in kept]


def _run(lens: Any, ids: list[int], names: Sequence[str]) -> None:
    from phaselens.data import Text, Tokens
    from phaselens.runs import MetricResult, Observer, choose
    from phaselens.runs.engine import measure

    chosen = choose(list(names))
    results = {one.name: MetricResult(one.metric, one.params, one.distribution) for one in chosen}
    texts = [Tokens(Text("bench", ""), tuple(ids), len(ids))]
    measure(lens, texts, chosen, results, batch_tokens=8192, seed=0, observer=Observer())
    for result in results.values():
        for failure in result.failures:
            raise RuntimeError(str(failure))


def measure_one(way: str, length: int, threads: int, repeats: int) -> None:
    """Print one way's best seconds (wall and CPU) and this process' peak memory, as JSON."""
    import torch

    torch.set_num_threads(threads)
    work = work_of(way, length)
    work()
    seconds, cpu = [], []
    for _ in range(repeats):
        wall, used = time.perf_counter(), time.process_time()
        work()
        seconds.append(time.perf_counter() - wall)
        cpu.append(time.process_time() - used)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"seconds": min(seconds), "cpu": min(cpu), "peak": peak}))


def fresh(way: str, length: int, threads: int, repeats: int) -> dict[str, float]:
    """`measure_one` in a process of its own."""
    import os

    limit = {name: str(threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    command = [sys.executable, __file__, "--one", way, "--lengths", str(length)]
    command += ["--threads", str(threads), "--repeats", str(repeats)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **limit})
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Print a table for each length."""
    import numpy as np

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048], help="tokens of the text")
    parser.add_argument(
        "--rounds", type=int, default=5, help="fresh processes for each way; the median is shown"
    )
    parser.add_argument("--repeats", type=int, default=2, help="passes in a process; its fastest counts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ways", nargs="+", help="some of the ways; the baseline is always among them")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure_one(options.one, options.lengths[0], options.threads, options.repeats)
        return
    ways = [*WAYS[:3], *METRICS, WAYS[3]]
    if options.ways:
        ways = ["bare", *(way for way in ways if way in options.ways and way != "bare")]
    for length in options.lengths:
        found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        for _ in range(options.rounds):
            for way in ways:
                found[way].append(fresh(way, length, options.threads, options.repeats))
        print(
            f"{length} tokens, {options.threads} thread(s), median of {options.rounds} processes", flush=True
        )
        print(f"{'':22}{'seconds':>9}{'ratio':>8}{'CPU s':>9}{'ratio':>8}{'peak GB':>9}")
        middle = {
            way: {key: float(np.median([each[key] for each in list_])) for key in list_[0]}
            for way, list_ in found.items()
        }
        base = middle["bare"]
        for way, at in middle.items():
            print(
                f"{way:22}{at['seconds']:9.3f}{at['seconds'] / base['seconds']:8.2f}"
                f"{at['cpu']:9.3f}{at['cpu'] / base['cpu']:8.2f}{at['peak']:9.2f}"
            )
        print(flush=True)


if __name__ == "__main__":
    main()
