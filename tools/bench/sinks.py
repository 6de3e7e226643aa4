"""Measure seconds and peak memory of one forward with attention statistics, relative to the model without PhaseLens.

    python tools/bench/sinks.py [--lengths 512 2048 4096 16384] [--rounds 3] [--threads 1]

Every measurement runs in a new process, so that the peak memory belongs to one variant. The variants alternate, round
by round, so that changes in the machine's speed affect all of them. A random Llama (8 layers, d_model 512, 8 heads) is
built in code. glibc keeps memory that is freed: whether it returns blocks to the system, and has them zeroed again,
depends on where the last one happens to lie, and costs a forward of the same operations up to a tenth.

    baseline   Hugging Face, SDPA, no unembedding
    lens       the lens, nothing hooked
    sink       hook_sink in every layer
    entropy    hook_sink and hook_entropy
    all        hook_lse, hook_sink, hook_entropy, hook_received
    eager      Hugging Face eager with output_attentions
    bridge     TransformerBridge without PhaseLens, run_with_cache
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

VARIANTS = ("baseline", "lens", "sink", "entropy", "all", "eager", "bridge")
HOOKS = {
    "lens": (),
    "sink": ("hook_sink",),
    "entropy": ("hook_sink", "hook_entropy"),
    "all": ("hook_lse", "hook_sink", "hook_entropy", "hook_received"),
}
N_LAYERS = 8
# 32 MiB is the largest threshold that glibc accepts.
KEEP_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(32 << 30)}
# Their attention matrices exceed the memory of an ordinary machine: 8 layers of 8 heads of 16,384² floats.
TOO_LARGE = {("eager", 16384), ("bridge", 16384)}


def build() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=32768,
    )
    return LlamaForCausalLM(config).eval()


def forward_of(variant: str, tokens: Any) -> Any:
    """Return a function that runs the forward once."""
    model = build()
    if variant == "baseline":
        return lambda: model.model(tokens, use_cache=False)
    if variant == "eager":
        model.set_attn_implementation("eager")
        return lambda: model.model(tokens, use_cache=False, output_attentions=True)
    if variant == "bridge":
        from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

        model.set_attn_implementation("eager")
        bridge = build_bridge_from_module(model, "LlamaForCausalLM", hf_config=model.config)
        return lambda: bridge.run_with_cache(tokens)
    import phaselens

    lens = phaselens.load(model, check=False)
    hooks = [
        (f"blocks.{i}.attn.{name}", lambda value, hook: None)
        for i in range(N_LAYERS)
        for name in HOOKS[variant]
    ]
    return lambda: lens.stream(tokens, hooks)


def child(variant: str, length: int, threads: int, repeats: int) -> None:
    import torch

    torch.set_num_threads(threads)
    tokens = torch.randint(2048, (1, length), generator=torch.Generator().manual_seed(1))
    forward = forward_of(variant, tokens)
    wall, cpu = [], []
    with torch.no_grad():
        forward()
        for _ in range(repeats):
            wall_start, cpu_start = time.perf_counter(), time.process_time()
            forward()
            wall.append(time.perf_counter() - wall_start)
            cpu.append(time.process_time() - cpu_start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"wall": min(wall), "cpu": min(cpu), "peak": peak}))


def measure(variant: str, length: int, threads: int) -> dict[str, float] | None:
    repeats = {512: 7, 2048: 4}.get(length, 2 if length <= 4096 else 1)
    command = [sys.executable, __file__, "--child", variant, str(length), str(threads), str(repeats)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | KEEP_FREED_MEMORY)
    if done.returncode != 0:
        print(f"{variant} at {length}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 4096, 16384])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    for length in options.lengths:
        variants = [variant for variant in options.variants if (variant, length) not in TOO_LARGE]
        rounds: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
        for _ in range(options.rounds if length <= 4096 else 1):
            for variant in variants:
                result = measure(variant, length, options.threads)
                if result is not None:
                    rounds[variant].append(result)
        report(length, rounds)


def report(length: int, rounds: dict[str, list[dict[str, float]]]) -> None:
    """Print one row per variant: the median over rounds of the best forward; ratios are medians within rounds."""
    print(f"\n{length} tokens      wall s    cpu s   peak GB   cpu ratio   peak ratio")
    for variant, results in rounds.items():
        if not results:
            continue
        row = f"{variant:10}" + "".join(
            f"{statistics.median(result[name] for result in results) * scale:10.3f}"
            for name, scale in (("wall", 1), ("cpu", 1), ("peak", 1e-9))
        )
        for name in ("cpu", "peak"):
            pairs = zip(results, rounds.get("baseline", []), strict=False)
            ratios = [result[name] / baseline[name] for result, baseline in pairs]
            row += f"{statistics.median(ratios):13.2f}" if ratios else " " * 13
        print(row, flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], *map(int, sys.argv[3:]))
    else:
        main()
