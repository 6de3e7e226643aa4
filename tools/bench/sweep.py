"""Measure the cost of sweeping one ablation over all N layers, in forwards of the same model.

    python tools/bench/sweep.py [--layers 32] [--tokens 512] [--width 256] [--rounds 5] [--threads 1]

The variants run alternately in one process; the first round is not counted, and the medians are compared.

    forwards   N × one whole forward of the Hugging Face model, SDPA, with logits and loss   the baseline
    hooks      N × TransformerLens' run_with_hooks on the same bridge, with logits and loss
    base       the run's engine without a condition: the losses of the unedited model, which a run computes once for
               all its metrics and sweeps
    mlp, attn  the same with the conditions "MLP (attention) output := 0" in each of the N layers

`alone` is the cost of the N conditions beyond `base`, in units of `forwards`. `worst` is the largest difference of a
text's mean loss from that of `hooks` for the same ablation. A sweep takes about (N + 1)/2 forwards of the layers and N
losses: the share of `forwards` grows as N shrinks.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# The repository replaces this folder, whose files would hide standard modules of the same name.
sys.path[0] = str(Path(__file__).resolve().parents[2])

POINTS = {"mlp": "hook_mlp_out", "attn": "hook_attn_out"}


def build(n_layers: int, width: int) -> Any:
    """Return a random Llama with heads of 32; few of its weights unembed, as in large models."""
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


def run_forwards(model: Any, ids: Any, n_layers: int) -> None:
    """Run N forwards without an ablation: the cost of the layers alone."""
    import torch
    from torch.nn import functional

    with torch.no_grad():
        for _ in range(n_layers):
            logits = model(ids, use_cache=False).logits
            functional.cross_entropy(logits[0, :-1], ids[0, 1:])


def sweep_with_hooks(lens: Any, ids: Any, point: str) -> list[float]:
    """Run the sweep with TransformerLens' `run_with_hooks`, as a user's script would."""
    import torch
    from torch.nn import functional

    losses = []
    for layer in range(lens.info.n_layers):
        hook = (f"blocks.{layer}.{point}", lambda tensor, hook: torch.zeros_like(tensor))
        with torch.no_grad():
            logits = lens.run_with_hooks(ids, return_type="logits", fwd_hooks=[hook])
        token_losses = functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")
        losses.append(float(token_losses.double().mean()))
    return losses


def sweep_with_conditions(lens: Any, ids: Any, point: str | None) -> list[float]:
    """Run the sweep as conditions of a causal metric; without a point, run only the baseline."""
    from phaselens.data import Text, TokenizedText
    from phaselens.plugin import CausalMetric, Condition, Edit, Params
    from phaselens.runs import feed_losses

    class LayerAblations(CausalMetric[Params]):
        name, version = "sweep", "1"

        def conditions(self) -> list[Condition]:
            layers = range(self.model.n_layers if point else 0)
            return [Condition("off", [Edit(f"blocks.{layer}.{point}", 0.0)], layer=layer) for layer in layers]

    metric = LayerAblations(lens.info, Params())
    feed_losses(lens, [TokenizedText(Text("bench", ""), tuple(ids[0].tolist()), ids.shape[1])], metric, [[0]])
    return [
        float(metric.losses.by_text(condition, [0])[0]) for condition in metric.losses.conditions.values()
    ]


def variants_of(
    n_layers: int, n_tokens: int, width: int
) -> tuple[dict[str, Callable[[], Any]], dict[str, list[float]]]:
    """Return the functions to time, by name, and the dictionary that collects their losses."""
    import torch

    import phaselens

    baseline_model, lens = (
        build(n_layers, width),
        phaselens.load(build(n_layers, width), label="bench", check=False),
    )
    ids = torch.randint(1, 2048, (1, n_tokens), generator=torch.Generator().manual_seed(0))
    losses_by_variant: dict[str, list[float]] = {}

    def record_losses(
        variant: str, work: Callable[[Any, Any, str], list[float]], point: str
    ) -> Callable[[], Any]:
        return lambda: losses_by_variant.__setitem__(variant, work(lens, ids, point))

    variants: dict[str, Callable[[], Any]] = {
        "forwards": lambda: run_forwards(baseline_model, ids, n_layers),
        "base": lambda: sweep_with_conditions(lens, ids, None),
    }
    for name, point in POINTS.items():
        variants[f"hooks {name}"] = record_losses(f"hooks {name}", sweep_with_hooks, point)
        variants[name] = record_losses(name, sweep_with_conditions, point)
    return variants, losses_by_variant


def compare(n_layers: int, n_tokens: int, width: int, rounds: int, clock: Callable[[], float]) -> None:
    """Time all variants alternately, and print one line per variant."""
    variants, losses_by_variant = variants_of(n_layers, n_tokens, width)
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    for round_index in range(rounds + 1):
        for variant, work in variants.items():
            start = clock()
            work()
            if round_index:
                times[variant].append(clock() - start)
    medians = {variant: statistics.median(seconds) for variant, seconds in times.items()}
    for variant, seconds in medians.items():
        line = f"{n_layers:>6}  {variant:<12}{seconds:>9.2f}{seconds / medians['forwards']:>9.2f}"
        if variant in POINTS:
            hooks_variant = f"hooks {variant}"
            worst = max(
                abs(loss - hooks_loss)
                for loss, hooks_loss in zip(
                    losses_by_variant[variant], losses_by_variant[hooks_variant], strict=True
                )
            )
            conditions_only = (seconds - medians["base"]) / medians["forwards"]
            line += f"{conditions_only:>9.2f}{seconds / medians[hooks_variant]:>9.2f}{worst:>10.1e}"
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
    print(
        f"{'layers':>6}  {'variant':<12}{'seconds':>9}{'× forwards':>9}{'alone':>9}{'× hooks':>9}{'worst':>10}"
    )
    for n_layers in options.layers:
        clock = time.process_time if options.cpu_time else time.perf_counter
        compare(n_layers, options.tokens, options.width, options.rounds, clock)


if __name__ == "__main__":
    main()
