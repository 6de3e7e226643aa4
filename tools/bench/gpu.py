"""Measure statistics of attention on a GPU, relative to the bare model: seconds, share of the matrix peak, memory.

    python tools/bench/gpu.py [--tokens 8192] [--long 131072] [--rounds 5] [--json FILE]

A random Llama of the shape of a 7B model (32 layers, width 4,096, 32 heads of 128) in bfloat16, built on the device.
The peak is that of a product of two matrices of 8,192 × 8,192, measured first. `--device cpu --layers 2 --width 256`
tries the script itself on a machine without a GPU.

    bare     Hugging Face, SDPA, no unembedding
    lens     the lens, nothing hooked
    sinks    hook_sink in every layer
    all      hook_lse, hook_sink, hook_entropy, hook_received in every layer
    long     hook_sink in every layer on the text of --long tokens

Then one layer's attention with its log-sum-exp, relative to causal attention by the fused kernel: with a window of an
eighth of the text and with a softcap, by FlexAttention and by what runs without it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# The repository replaces this folder, whose files would hide standard modules of the same name.
sys.path[0] = str(Path(__file__).resolve().parents[2])

HOOKS = {
    "lens": (),
    "sinks": ("hook_sink",),
    "all": ("hook_lse", "hook_sink", "hook_entropy", "hook_received"),
}
GOALS = {"sinks": 1.03, "all": 1.5}
D_HEAD, D_VOCAB = 128, 32_000


def build(n_layers: int, width: int, longest: int, device: str) -> Any:
    """Return the random Llama on the device, in bfloat16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=D_VOCAB,
        hidden_size=width,
        intermediate_size=int(width * 2.6875),
        num_hidden_layers=n_layers,
        num_attention_heads=max(1, width // D_HEAD),
        num_key_value_heads=max(1, width // D_HEAD),
        max_position_embeddings=longest,
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)


class Timer:
    """Seconds and peak memory of work on one device."""

    def __init__(self, device: str) -> None:
        self.device = device

    def wait(self) -> None:
        """Wait until the device has finished."""
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()

    def measure(self, work: Callable[[], object], rounds: int) -> dict[str, float]:
        """Return the median seconds of some rounds after one that does not count, and the peak memory in bytes."""
        import torch

        work()
        self.wait()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(rounds):
            start = time.perf_counter()
            work()
            self.wait()
            seconds.append(time.perf_counter() - start)
        peak = torch.cuda.max_memory_allocated() if self.device == "cuda" else 0
        return {"seconds": statistics.median(seconds), "peak_bytes": peak}


def matrix_peak(timer: Timer, size: int) -> float:
    """Return the measured operations per second of a bfloat16 product of two square matrices."""
    import torch

    left, right = (torch.randn(size, size, device=timer.device).bfloat16() for _ in range(2))
    return float(2 * size**3 / timer.measure(lambda: left @ right, 10)["seconds"])


def n_operations(n_layers: int, width: int, n_tokens: int) -> float:
    """Return the operations of one forward without unembedding: products with weights, and causal attention."""
    per_token = 4 * width**2 + 3 * width * int(width * 2.6875)
    return float(n_layers * (2 * n_tokens * per_token + 2 * n_tokens**2 * width))


def measure_all(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return the measurements by variant; a variant that failed holds its error instead."""
    import torch

    import phaselens

    timer = Timer(options.device)
    longest = max(options.tokens, options.long)
    peak = matrix_peak(timer, 8192 if options.device == "cuda" else 512)
    model = build(options.layers, options.width, longest, options.device)
    ids = torch.randint(D_VOCAB, (1, longest), generator=torch.Generator().manual_seed(1)).to(options.device)
    tokens = ids[:, : options.tokens]
    results: dict[str, dict[str, float]] = {"matrix peak": {"operations_per_second": peak}}
    with torch.no_grad():
        results["bare"] = timer.measure(lambda: model.model(tokens, use_cache=False), options.rounds)
    lens = phaselens.load(model, label="bench")

    def streamed(names: tuple[str, ...], text: Any) -> Callable[[], object]:
        hooks = [
            (f"blocks.{layer}.attn.{name}", lambda value, hook: None)
            for layer in range(options.layers)
            for name in names
        ]
        return lambda: lens.stream(text, hooks)

    operations = n_operations(options.layers, options.width, options.tokens)
    for name, hooks in HOOKS.items():
        results[name] = attempted(lambda hooks=hooks: timer.measure(streamed(hooks, tokens), options.rounds))
    for row in results.values():
        if "seconds" in row:
            row["ratio"] = row["seconds"] / results["bare"]["seconds"]
            row["share_of_peak"] = operations / row["seconds"] / peak
    results["long"] = attempted(lambda: timer.measure(streamed(HOOKS["sinks"], ids[:, : options.long]), 1))
    return results | attention_rows(timer, options)


def attention_rows(timer: Timer, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return the measurements of one layer's attention, by kernel."""
    import torch

    from phaselens import attention
    from phaselens.attention import _flex

    shape = (1, max(1, options.width // D_HEAD), options.tokens, D_HEAD)
    q, k, v = (torch.randn(shape, device=timer.device).bfloat16() for _ in range(3))
    is_available = _flex.is_available

    def measured(flex: bool, **softmax_options: Any) -> dict[str, float]:
        _flex.is_available = is_available if flex else lambda device: False
        try:
            with torch.no_grad():
                return timer.measure(
                    lambda: attention.attend(q, k, v, scale=D_HEAD**-0.5, **softmax_options), options.rounds
                )
        finally:
            _flex.is_available = is_available

    rows = {"causal": attempted(lambda: measured(False))}
    for name, softmax_options in (
        ("window", {"window": options.tokens // 8}),
        ("softcap", {"softcap": 30.0}),
    ):
        for kernel, flex in (("flex", True), ("other", False)):
            rows[f"{name}, {kernel}"] = attempted(
                lambda flex=flex, chosen=softmax_options: measured(flex, **chosen)
            )
    for row in rows.values():
        if "seconds" in row and "seconds" in rows["causal"]:
            row["ratio"] = row["seconds"] / rows["causal"]["seconds"]
    return rows


def attempted(work: Callable[[], dict[str, float]]) -> dict[str, Any]:
    """Return the measurement, or the error of one that failed, so that the others are still measured."""
    try:
        return work()
    except RuntimeError as error:  # out of memory, too
        return {"error": " ".join(str(error).split())[:300]}


def main() -> int:
    """Print one row per variant, and write them as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--long", type=int, default=131_072)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = measure_all(options)
    if options.json is not None:
        options.json.write_text(
            json.dumps({"options": vars(options) | {"json": None}, "results": results}, indent=2)
        )
    print(f"{'':14}{'seconds':>10}{'ratio':>8}{'goal':>7}{'of peak':>9}{'peak GB':>9}")
    for name, row in results.items():
        if "seconds" not in row:
            print(
                f"{name:14}{row.get('error', format(row.get('operations_per_second', 0) / 1e12, '.1f') + ' TFLOP/s')}"
            )
            continue
        ratio, share = (format(row[key], ".2f") if key in row else "" for key in ("ratio", "share_of_peak"))
        goal = GOALS.get(name, "")
        print(
            f"{name:14}{row['seconds']:10.3f}{ratio:>8}{goal:>7}{share:>9}{row['peak_bytes'] / 1e9:9.2f}",
            flush=True,
        )
    return int(any("error" in row for row in results.values()))


if __name__ == "__main__":
    sys.exit(main())
