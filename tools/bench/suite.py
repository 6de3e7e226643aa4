"""Measure seconds and peak memory of one pass with metrics, relative to the model's forward without PhaseLens.

    python tools/bench/suite.py [--lengths 512 2048] [--rounds 5] [--threads 1]

Every measurement runs in a new process, so that the peak memory belongs to one variant. The variants alternate, round
by round, so that changes in the machine's speed affect all of them. The model is that of `sinks.py` with one massive
row, as trained models have, so that `compression` excludes it from its spectra.

    baseline   Hugging Face, SDPA, no unembedding
    lens       the lens, nothing hooked
    all        a run with all observational metrics
    NAME       a run with that metric alone
    spectrum   the matrix entropy of all layers' residuals, without a forward
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

# The repository replaces this folder, whose files would hide standard modules of the same name.
sys.path[0] = str(Path(__file__).resolve().parents[2])

VARIANTS = ("baseline", "lens", "all", "spectrum")
METRICS = (
    "attention-patterns",
    "bos-norm",
    "bos-write",
    "compression",
    "layer-balance",
    "massive-activations",
    "massive-values",
    "position-curves",
    "qk-geometry",
    "rope-frequencies",
    "sink-tokens",
    "position-probe",
    "sinks",
)
"""Observational metrics, which share one forward. Causal metrics need further forwards."""


def spiked_model() -> Any:
    """Return the random Llama, whose first token gets a large embedding: a massive row from the first layer on."""
    import torch
    from tools.bench.sinks import build

    model = build()
    with torch.no_grad():
        model.model.embed_tokens.weight[0] *= 3000
    return model


def work_for(variant: str, length: int) -> Any:
    """Return a function that runs the variant once."""
    import torch

    model = spiked_model()
    ids = torch.randint(1, 2048, (length,), generator=torch.Generator().manual_seed(0))
    ids[0] = 0
    if variant == "baseline":

        def run_baseline() -> None:
            with torch.no_grad():
                model.base_model(ids[None], use_cache=False)

        return run_baseline
    import phaselens

    lens = phaselens.load(model, label="bench", check=False)
    if variant == "lens":
        return lambda: lens.stream(ids[None])
    if variant == "spectrum":
        return _spectra(lens, ids)
    lens.text_tokenizer = _Numbers()
    return lambda: _run(lens, ids.tolist(), METRICS if variant == "all" else [variant])


class _Numbers:
    """A tokenizer that writes token ids as numbers."""

    def convert_ids_to_tokens(self, token: int) -> str:
        return str(token)


def _spectra(lens: Any, ids: Any) -> Any:
    from phaselens.spectrum import massive_rows, row_norms, spectra

    residuals: list[Any] = []
    points = [
        (f"blocks.{layer}.hook_resid_post", lambda x, hook: residuals.append(x[0].clone()))
        for layer in range(8)
    ]
    lens.stream(ids[None], points)
    return lambda: [spectra(x, massive_rows(row_norms(x))) for x in residuals]


def _run(lens: Any, ids: list[int], names: Sequence[str]) -> None:
    from phaselens.data import Text, TokenizedText
    from phaselens.runs import MetricResult, Observer, select_metrics
    from phaselens.runs.engine import measure

    chosen = select_metrics(list(names))
    results = {
        metric.name: MetricResult(metric.metric, metric.params, metric.distribution) for metric in chosen
    }
    texts = [TokenizedText(Text("bench", ""), tuple(ids), len(ids))]
    measure(lens, texts, chosen, results, batch_tokens=8192, seed=0, observer=Observer())
    for result in results.values():
        for failure in result.failures:
            raise RuntimeError(str(failure))


def measure_variant(variant: str, length: int, threads: int, repeats: int) -> None:
    """Print one variant's best seconds (wall and CPU) and this process' peak memory, as JSON."""
    import torch

    torch.set_num_threads(threads)
    work = work_for(variant, length)
    work()
    seconds, cpu = [], []
    for _ in range(repeats):
        wall, used = time.perf_counter(), time.process_time()
        work()
        seconds.append(time.perf_counter() - wall)
        cpu.append(time.process_time() - used)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"seconds": min(seconds), "cpu": min(cpu), "peak": peak}))


def measure_in_new_process(variant: str, length: int, threads: int, repeats: int) -> dict[str, float]:
    """Run `measure_variant` in a new process."""
    import os

    from tools.bench.sinks import KEEP_FREED_MEMORY

    limit = {name: str(threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    command = [sys.executable, __file__, "--one", variant, "--lengths", str(length)]
    command += ["--threads", str(threads), "--repeats", str(repeats)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, **limit, **KEEP_FREED_MEMORY}
    )
    measurement: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measurement


def main() -> None:
    """Print one table per length."""
    import numpy as np

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048], help="tokens of the text")
    parser.add_argument(
        "--rounds", type=int, default=5, help="processes for each variant; the median is printed"
    )
    parser.add_argument("--repeats", type=int, default=2, help="passes in a process; the fastest counts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--variants", nargs="+", help="some of the variants; the baseline is always included")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure_variant(options.one, options.lengths[0], options.threads, options.repeats)
        return
    variants = [*VARIANTS[:3], *METRICS, VARIANTS[3]]
    if options.variants:
        variants = [
            "baseline",
            *(variant for variant in variants if variant in options.variants and variant != "baseline"),
        ]
    for length in options.lengths:
        measurements: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
        for _ in range(options.rounds):
            for variant in variants:
                measurements[variant].append(
                    measure_in_new_process(variant, length, options.threads, options.repeats)
                )
        print(
            f"{length} tokens, {options.threads} thread(s), median of {options.rounds} processes", flush=True
        )
        print(f"{'':22}{'seconds':>9}{'ratio':>8}{'CPU s':>9}{'ratio':>8}{'peak GB':>9}")
        medians = {
            variant: {
                key: float(np.median([measurement[key] for measurement in measurements_of_variant]))
                for key in measurements_of_variant[0]
            }
            for variant, measurements_of_variant in measurements.items()
        }
        base = medians["baseline"]
        for variant, row in medians.items():
            print(
                f"{variant:22}{row['seconds']:9.3f}{row['seconds'] / base['seconds']:8.2f}"
                f"{row['cpu']:9.3f}{row['cpu'] / base['cpu']:8.2f}{row['peak']:9.2f}"
            )
        print(flush=True)


if __name__ == "__main__":
    main()
