"""Measure seconds to load a checkpoint and to run one forward, relative to transformers alone, family by family.

    python tools/bench/loading.py [--families llama gemma2 gpt2 mixtral opt gptj bamba] [--rounds 3] [--tokens 512]

A random checkpoint (6 layers, d_model 256) is saved for each family, and every variant loads it in a process of its
own, in turn, round by round. Times are CPU seconds of one thread, the smallest of all rounds, after the imports.

    transformers   AutoModelForCausalLM.from_pretrained, and the model's own forward with logits
    lens           phaselens.load with its self-check, and lens.stream with logits, nothing hooked
    unchecked      the same with check=False
    bridge         transformers, and TransformerLens' bridge around the model, where it has an adapter
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# The repository replaces this folder, whose files would hide standard modules of the same name.
sys.path[0] = str(Path(__file__).resolve().parents[2])

VARIANTS = ("transformers", "lens", "unchecked", "bridge")
FAMILIES = ("llama", "gemma2", "gpt2", "mixtral", "opt", "gptj", "bamba")
_D_MODEL, _N_LAYERS, _N_HEADS, _D_VOCAB = 256, 6, 8, 2048


def save(family: str, folder: Path) -> None:
    """Save a random checkpoint of a model type."""
    import torch
    from tools.families import configs
    from transformers import AutoModelForCausalLM

    configs.D_MODEL, configs.D_VOCAB = _D_MODEL, _D_VOCAB
    config = configs.tiny_config(family)
    for name, value in {
        "hidden_size": _D_MODEL,
        "vocab_size": _D_VOCAB,
        "num_hidden_layers": _N_LAYERS,
        "max_position_embeddings": 1024,
        "layer_types": None
        if not getattr(config, "layer_types", None)
        else (config.layer_types * _N_LAYERS)[:_N_LAYERS],
    }.items():
        if value is not None and hasattr(config, name):
            setattr(config, name, value)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def prepare(variant: str, folder: str) -> Any:
    """Load the checkpoint; return a function that runs a forward on tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    if variant in ("lens", "unchecked"):
        import phaselens

        lens = phaselens.load(folder, device="cpu", dtype="float32", check=variant == "lens")
        return lambda tokens: lens.stream(tokens, unembed=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if variant == "transformers":
        return lambda tokens: model(tokens, use_cache=False).logits
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    bridge = build_bridge_from_module(model, type(model).__name__, hf_config=model.config)
    return lambda tokens: bridge(tokens, return_type="logits")


def child(variant: str, folder: str, n_tokens: int) -> None:
    """Measure one variant in this process, and print the seconds."""
    import torch
    import transformer_lens  # noqa: F401 - imports do not count
    from transformers.utils import logging

    import phaselens  # noqa: F401

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    tokens = torch.randint(_D_VOCAB, (1, n_tokens), generator=torch.Generator().manual_seed(1))
    prepare(variant, folder)  # imports of the family's own files do not count
    start = time.process_time()
    forward = prepare(variant, folder)
    loading = time.process_time() - start
    seconds = []
    with torch.no_grad():
        for _ in range(4):
            start = time.process_time()
            forward(tokens)
            seconds.append(time.process_time() - start)
    print(json.dumps({"load": loading, "forward": min(seconds)}))


def measured(variant: str, folder: Path, n_tokens: int) -> dict[str, float] | None:
    """Return the seconds of one variant in a new process; None if it cannot load the checkpoint."""
    command = [sys.executable, __file__, "--child", variant, str(folder), str(n_tokens)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"  {variant}: {(done.stderr.strip().splitlines() or ['failed'])[-1][:110]}", file=sys.stderr)
        return None
    seconds: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", default=FAMILIES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=512)
    options = parser.parse_args()
    print(f"{'family':10} {'variant':13} {'load s':>8} {'ratio':>7} {'forward s':>10} {'ratio':>7}")
    for family in options.families:
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / family
            save(family, folder)
            rounds: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
            for _ in range(options.rounds):
                for variant in VARIANTS:
                    if (seconds := measured(variant, folder, options.tokens)) is not None:
                        rounds[variant].append(seconds)
        best = {
            variant: {part: min(seconds[part] for seconds in results) for part in ("load", "forward")}
            for variant, results in rounds.items()
            if results
        }
        for variant, seconds in best.items():
            load_ratio, forward_ratio = (
                seconds[part] / best["transformers"][part] for part in ("load", "forward")
            )
            print(
                f"{family:10} {variant:13} {seconds['load']:8.3f} {load_ratio:7.2f} {seconds['forward']:10.4f} "
                f"{forward_ratio:7.3f}",
                flush=True,
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        main()
