"""Measure the memory that loading takes beyond what the process has, relative to the checkpoint.

    python tools/bench/peak.py [--megabytes 500] [--variants float32 bfloat16 disk]

A random Llama in float32, in shards, is saved first. Every variant loads it in a new process: as it is, in bfloat16, or
with all layers on the disk. Resident memory counts the pages of the checkpoint's files that are mapped, which the
system can drop; anonymous memory does not.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

# The repository replaces this folder, whose files would hide standard modules of the same name.
sys.path[0] = str(Path(__file__).resolve().parents[2])

VARIANTS = ("float32", "bfloat16", "disk")
OFFLOADED = dict.fromkeys(("model.layers", "model.norm", "lm_head"), "disk")


def save(folder: Path, megabytes: int) -> None:
    """Save a random Llama of about this size."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width = 1024
    layer = (3 * width * width + 3 * width * 2752) * 4 / 1e6
    config = LlamaConfig(
        vocab_size=16_000,
        hidden_size=width,
        intermediate_size=2752,
        num_hidden_layers=max(1, round((megabytes - 131) / layer)),
        num_attention_heads=16,
        num_key_value_heads=8,
    )
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="150MB")


def resident() -> dict[str, int]:
    """Return the resident and the anonymous memory of this process, in bytes."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    fields = {
        words[0]: int(words[1]) * 1024 for words in lines if words and words[0] in ("VmRSS:", "RssAnon:")
    }
    return {"resident": fields["VmRSS:"], "anonymous": fields["RssAnon:"]}


def child(variant: str, folder: str) -> None:
    """Load the checkpoint, and print the peaks relative to its size as JSON."""
    import phaselens
    from phaselens.testing import tiny_lens

    tiny_lens("llama")  # imports do not count
    size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    before, peak = resident(), {"resident": 0, "anonymous": 0}
    finished = threading.Event()

    def watch() -> None:
        while not finished.is_set():
            now = resident()
            peak.update({name: max(peak[name], now[name]) for name in peak})
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    if variant == "disk":
        phaselens.load(
            folder, device_map={"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", **OFFLOADED}
        )
    else:
        phaselens.load(folder, device="cpu", dtype=variant)
    finished.set()
    watcher.join()
    print(json.dumps({name: (peak[name] - before[name]) / size for name in peak}))


def measured(variant: str, folder: Path) -> dict[str, float]:
    """Return the peaks of one variant in a new process, in sizes of the checkpoint."""
    command = [sys.executable, __file__, "--child", variant, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peaks: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return peaks


def main() -> None:
    """Print one row per variant."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    options = parser.parse_args()
    print(f"{'':10}{'resident ×':>12}{'anonymous ×':>13}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder), options.megabytes)
        for variant in options.variants:
            peaks = measured(variant, Path(folder))
            print(f"{variant:10}{peaks['resident']:12.2f}{peaks['anonymous']:13.2f}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3])
    else:
        main()
