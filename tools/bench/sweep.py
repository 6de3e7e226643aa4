"""What sweeping one ablation over all N layers costs, in forwards of the same model.

    python tools/bench/sweep.py [--layers 32] [--tokens 512] [--width 256] [--rounds 5] [--threads 1]

The ways take turns in one process, round by round, after one round that is not counted; the medians are compared.

    naive      N × one whole forward of the Hugging Face model, SDPA, with logits and loss   the baseline
    stock      N × TransformerLens' run_with_hooks on the same bridge, with logits and loss
    base       the run's own engine without a condition: the unedited model's losses, which a run needs once for all
               its metrics and sweeps
    mlp, attn  the same with the conditions "MLP (attention) output := 0" in each of the N layers

`alone` is what the N conditions add to `base`, again in units of `naive`: N ablated forwards either way. `worst` is the
largest difference of a text's mean loss from what `stock` gives for the same ablation. A sweep takes about (N + 1)/2
forwards of the layers and N losses: the fewer layers, the more of `naive` that is.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# In place of this folder, whose files would hide standard modules of the same name.
sys.path[0] = str(Path(__file__).resolve().parents[2])

POINTS = {"mlp": "hook_mlp_out", "attn": "hook_attn_out"}


def build(n_layers: int, width: int) -> Any:
    """A random Llama with heads of 32; few of its weights unembed, as in large models."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 43 // 16,
        num_hidden_layers=n_layers,
        num_attention_heads=width // 32,
        vocab_size=2048,
        max_position_embeddings=4096,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).eval()


def naive(model: Any, ids: Any, n_layers: int) -> None:
    """N forwards that ablate nothing: the price of the layers alone."""
    import torch
    from torch.nn import functional

    with torch.no_grad():
        for _ in range(n_layers):
            logits = model(ids, use_cache=False).logits
            functional.cross_entropy(logits[0, :-1], ids[0, 1:])


def stock(lens: Any, ids: Any, point: str) -> list[float]:
    """The sweep as a script with TransformerLens writes it."""
    import torch
    from torch.nn import functional

    losses = []
    for layer in range(lens.info.n_layers):
        hook = (f"blocks.{layer}.{point}", lambda tensor, hook: torch.zeros_like(tensor))
        with torch.no_grad():
            logits = lens.run_with_hooks(ids, return_type="logits", fwd_hooks=[hook])
        each = functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")
        losses.append(float(each.double().mean()))
    return losses


def sweep(lens: Any, ids: Any, point: str | None) -> list[float]:
    """The sweep as conditions of a causal metric; without a point, the baseline alone."""
    from phaselens.data import Text, Tokens
    from phaselens.plugin import CausalMetric, Condition, Edit, Params
    from phaselens.runs import gather_losses

    class Sweep(CausalMetric[Params]):
        name, version = "sweep", "1"

        def conditions(self) -> list[Condition]:
            layers = range(self.model.n_layers if point else 0)
            return [Condition("off", [Edit(f"blocks.{layer}.{point}", 0.0)], layer=layer) for layer in layers]

    metric = Sweep(lens.info, Params())
    gather_losses(lens, [Tokens(Text("bench", ""), tuple(ids[0].tolist()), ids.shape[1])], metric, [[0]])
    return [float(metric.losses.of(condition, [0])[0]) for condition in metric.losses.conditions.values()]


def ways_of(
    n_layers: int, n_tokens: int, width: int
) -> tuple[dict[str, Callable[[], Any]], dict[str, list[float]]]:
    """What to time, by name, and where each leaves its losses."""
    import torch

    import phaselens

    bare, lens = build(n_layers, width), phaselens.load(build(n_layers, width), label="bench", check=False)
    ids = torch.randint(1, 2048, (1, n_tokens), generator=torch.Generator().manual_seed(0))
    found: dict[str, list[float]] = {}

    def keeping(way: str, work: Callable[[Any, Any, str], list[float]], point: str) -> Callable[[], Any]:
        return lambda: found.__setitem__(way, work(lens, ids, point))

    ways: dict[str, Callable[[], Any]] = {
        "naive": lambda: naive(bare, ids, n_layers),
        "base": lambda: sweep(lens, ids, None),
    }
    for name, point in POINTS.items():
        ways[f"stock {name}"] = keeping(f"stock {name}", stock, point)
        ways[name] = keeping(name, sweep, point)
    return ways, found


def compare(n_layers: int, n_tokens: int, width: int, rounds: int, clock: Callable[[], float]) -> None:
    """Time all ways in turns, and print a line for each."""
    ways, found = ways_of(n_layers, n_tokens, width)
    times: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(rounds + 1):
        for way, work in ways.items():
            start = clock()
            work()
            if turn:
                times[way].append(clock() - start)
    usual = {way: statistics.median(spent) for way, spent in times.items()}
    for way, spent in usual.items():
        line = f"{n_layers:>6}  {way:<12}{spent:>9.2f}{spent / usual['naive']:>9.2f}"
        if way in POINTS:
            stock_way = f"stock {way}"
            worst = max(abs(one - other) for one, other in zip(found[way], found[stock_way], strict=True))
            alone = (spent - usual["base"]) / usual["naive"]
            line += f"{alone:>9.2f}{spent / usual[stock_way]:>9.2f}{worst:>10.1e}"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[32], help="32, as Llama-2-7B has")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--width", type=int, default=256, help="d_model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true", help="seconds of this process, for a busy machine")
    options = parser.parse_args()

    import torch

    torch.set_num_threads(options.threads)
    print(f"{'layers':>6}  {'way':<12}{'seconds':>9}{'× naive':>9}{'alone':>9}{'× stock':>9}{'worst':>10}")
    for n_layers in options.layers:
        clock = time.process_time if options.cpu_time else time.perf_counter
        compare(n_layers, options.tokens, options.width, options.rounds, clock)


if __name__ == "__main__":
    main()
