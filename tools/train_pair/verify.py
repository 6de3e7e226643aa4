"""Measure a finished pair through PhaseLens itself: `python -m tools.train_pair.verify --corpus DIR`.

Prints the figures of the model cards, for any two checkpoint folders or the bundled pair.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from tools.train_pair import corpus
from tools.train_pair.measure import TAU, bos_ratio, matrix_entropy
from transformers import AutoTokenizer

import phaselens

BOS_RATIO = 5.0
SHARE = 0.25
TWIN_LOSS = 0.1


def through_lens(source: str, texts: torch.Tensor, batch_size: int = 16) -> dict[str, Any]:
    """Measure the statistics of `measure` through the lens' hook points, for a folder, "rope" or "drope".

    `texts` are [text, position], `<s>` first, all of one length. It adds two statistics by layer: the entropy of all
    positions but the first, and the share of their squared norm that is their mean's.
    """
    lens = phaselens.load(source, device="cpu")
    n_layers = lens.info.n_layers
    by_layer = ("bos_ratio", "bos_norm", "entropy", "entropy_without_bos", "mean_share")
    statistics: dict[str, list[torch.Tensor]] = {name: [] for name in ("loss", "sink", *by_layer)}
    for batch in texts.split(batch_size):
        sinks: list[torch.Tensor] = [torch.empty(0)] * n_layers
        residuals: list[torch.Tensor] = [torch.empty(0)] * n_layers

        hooks = [(f"blocks.{i}.attn.hook_sink", _keeper(sinks, i)) for i in range(n_layers)]
        hooks += [(f"blocks.{i}.hook_resid_post", _keeper(residuals, i)) for i in range(n_layers)]
        logits = lens.stream(batch, hooks, unembed=True)
        by_token = functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), reduction="none"
        )
        statistics["loss"].append(by_token.view(len(batch), -1).mean(1))
        statistics["sink"].append(torch.stack([sink[:, :, 1:].mean(-1) for sink in sinks], dim=1))
        statistics["bos_ratio"].append(torch.stack([bos_ratio(r) for r in residuals], dim=1))
        statistics["bos_norm"].append(torch.stack([r[:, 0].double().norm(dim=-1) for r in residuals], dim=1))
        statistics["entropy"].append(torch.stack([matrix_entropy(r) for r in residuals], dim=1))
        statistics["entropy_without_bos"].append(
            torch.stack([matrix_entropy(r[:, 1:]) for r in residuals], dim=1)
        )
        statistics["mean_share"].append(torch.stack([mean_share(r[:, 1:]) for r in residuals], dim=1))
    means = {name: torch.cat(batches).double().mean(0) for name, batches in statistics.items()}
    rounded = {name: [round(v, 4) for v in means[name].tolist()] for name in by_layer}
    return {
        "positions": list(lens.info.positions),
        "loss": means["loss"].item(),
        "sink": [[round(v, 5) for v in row] for row in means["sink"].tolist()],
        "sink_rate": (means["sink"] >= TAU).double().mean().item(),
        **rounded,
    }


def mean_share(residual: torch.Tensor) -> torch.Tensor:
    """Share of a text's squared norm that is its mean vector's: [text, position, d_model] -> [text], 0 to 1."""
    rows = residual.double()
    return rows.mean(1).square().sum(-1) / rows.square().sum(-1).mean(-1)


def _keeper(captured: list[torch.Tensor], layer: int) -> Callable[[torch.Tensor, Any], None]:
    def keep(value: torch.Tensor, hook: Any) -> None:
        captured[layer] = value.detach().clone()

    return keep


def expected_properties(rope: dict[str, Any], drope: dict[str, Any]) -> dict[str, Any]:
    """Return the expected properties of the pair, each as (measured value, requirement, whether it holds)."""
    past = [score for layer in rope["sink"][1:] for score in layer]
    share = sum(score >= TAU for score in past) / len(past)
    entropy = rope["entropy"]
    # After layer 0, in the middle, before the last layer: a model of fewer than four layers has no middle.
    middle, around = entropy[1:-2], (entropy[0], entropy[-2])
    valley = min(middle) if middle else None
    gap = drope["loss"] / rope["loss"] - 1
    peak = max(rope["bos_ratio"])
    return {
        "share of heads past layer 0 with sink score >= 0.3": (share, f">= {SHARE}", share >= SHARE),
        "largest norm ratio of <s>": (peak, f">= {BOS_RATIO}", peak >= BOS_RATIO),
        "least entropy of the middle layers": (
            valley,
            f"< {around[0]} and {around[1]}",
            valley is not None and valley < min(around),
        ),
        "drope's held-out loss over rope's, less 1": (gap, f"<= {TWIN_LOSS}", gap <= TWIN_LOSS),
    }


def held_out_tokens(
    folder: Path, tokenizer: str, held_out: tuple[str, ...], count: int, length: int
) -> torch.Tensor:
    """Return `count` evenly spaced windows of the held-out books under the pair's own tokenizer, [text, position]."""
    _, held = corpus.books(folder, held_out)
    stream = corpus.encode_books(AutoTokenizer.from_pretrained(tokenizer), held)
    return torch.from_numpy(corpus.held_out_windows(stream, count, length))


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m tools.train_pair.verify", description=__doc__)
    p.add_argument("--corpus", type=Path, required=True)
    p.add_argument("--pair", type=Path, help="folder with rope/ and drope/ (default: the bundled pair)")
    p.add_argument("--held-out", nargs="+", default=list(corpus.HELD_OUT))
    p.add_argument("--count", type=int, default=128)
    p.add_argument("--length", type=int, default=256)
    args = p.parse_args()
    bundled = Path(phaselens.__file__).parent / "data" / "models"
    folder = args.pair or bundled
    texts = held_out_tokens(args.corpus, str(folder / "rope"), tuple(args.held_out), args.count, args.length)
    rope, drope = (through_lens(str(folder / twin), texts) for twin in ("rope", "drope"))
    print(json.dumps({"rope": rope, "drope": drope, "shown": expected_properties(rope, drope)}, indent=1))


if __name__ == "__main__":
    main()
