"""Measure what each dtype does to a model: its own rounding, apart from the error of the lens.

    python tools/bench/dtypes.py [--models rope drope mixtral gpt_oss …] [--tokens 64] [--seeds 4]

A model is `rope`, `drope`, or a model type, of which tiny random models are created. Each column is the largest value
over all texts, layers, heads and queries:

    lens       difference of the statistics from those of the same queries and keys in float64; relative for the
               log-sum-exp
    sink, entropy, logits
               difference from the same model in float64, the logits relative to the largest: the dtype's own error
    alike      the same for the logits, with the experts that the float64 model chooses
    other      share of the tokens, over all layers, that the dtype sends to other experts than float64 does
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from typing import Any

# The repository replaces this folder, whose files would hide standard modules of the same name.
sys.path[0] = str(Path(__file__).resolve().parents[2])

DTYPES = ("float32", "bfloat16", "float16")
BUNDLED = ("rope", "drope")
MODELS = (*BUNDLED, "gemma2", "mixtral", "qwen3_moe", "glm4_moe", "gpt_oss")


def load(name: str, dtype: str, seed: int) -> Any:
    """Return a lens around a bundled model, or a tiny random model of this type."""
    import torch
    from tools.families.models import tiny_model

    import phaselens

    source = name if name in BUNDLED else tiny_model(name, seed=seed).to(getattr(torch, dtype))
    return phaselens.load(source, dtype=dtype, device="cpu")


def forward(lens: Any, tokens: Any) -> tuple[Any, dict[Any, Any]]:
    """Return logits, and statistics, queries and keys by layer and point."""
    from phaselens.lens.checks import capture
    from phaselens.lens.points import ROTATED_POINTS, STATISTICS, in_layer

    names = {
        (layer, point): in_layer(layer, f"attn.{point}")
        for layer in range(lens.info.n_layers)
        for point in (*STATISTICS, *ROTATED_POINTS)
    }
    return capture(lens, tokens, names, unembed=True)


def lens_error(lens: Any, activations: dict[Any, Any]) -> float:
    """Return the largest difference of a statistic from that of the same queries and keys in float64."""
    import torch

    from phaselens import attention
    from phaselens.lens import families
    from phaselens.lens.components import attention_layers

    worst = 0.0
    for layer, component in enumerate(attention_layers(lens)):
        query, key = (activations[layer, f"hook_rot_{side}"].transpose(1, 2).double() for side in "qk")
        scores = attention.explicit_scores(
            query,
            key,
            scale=lens.info.scales[layer],
            window=lens.info.windows[layer],
            softcap=lens.info.softcap,
        )
        lse = scores.logsumexp(-1)
        sink_logits = families.sink_logits_of(component.original_component)
        if sink_logits is not None:
            lse = torch.logaddexp(lse, sink_logits.detach().double()[None, :, None])
        pattern = (scores - lse[..., None]).exp()
        expected = {
            "hook_sink": pattern[..., 0],
            "hook_entropy": torch.special.entr(pattern).sum(-1),
            "hook_received": pattern.sum(-2),
        }
        gaps = [gap(activations[layer, name], value) for name, value in expected.items()]
        worst = max(worst, *gaps, gap(activations[layer, "hook_lse"], lse) / max(1.0, float(lse.abs().max())))
    return worst


def gap(measured: Any, expected: Any) -> float:
    """Return the largest difference."""
    return float((measured.double() - expected.double()).abs().max())


def share_of_other_experts(chosen: Any, exact: Any) -> float | None:
    """Return the share of tokens with other experts; None for a model without a mixture."""
    pairs = [
        (own.sort(-1).values, other.sort(-1).values)
        for line, calls in exact.by_line.items()
        for own, other in zip(chosen.by_line.get(line, ()), calls, strict=True)
        if own is not None and own.shape == other.shape
    ]
    if not pairs:
        return None
    return max(float((own != other).any(-1).any(-1).double().mean()) for own, other in pairs)


def measure(name: str, dtype: str, n_tokens: int, seed: int) -> dict[str, float | None]:
    """Return the columns of one model and one dtype."""
    import torch

    from phaselens.lens.choices import recorded_choices, repeated_choices

    exact_lens, lens = load(name, "float64", seed), load(name, dtype, seed)
    # The float64 model has the weights of the rounded one: only its arithmetic differs.
    exact_model, model = exact_lens.original_model, lens.original_model
    exact_model.load_state_dict(copy.deepcopy(model.state_dict()))
    tokens = torch.randint(4, 58, (2, n_tokens), generator=torch.Generator().manual_seed(seed))
    with recorded_choices(tokens) as exact_choices:
        exact_logits, exact = forward(exact_lens, tokens)
    with recorded_choices(tokens) as choices:
        logits, activations = forward(lens, tokens)
    with repeated_choices(exact_choices, float("inf")):
        alike_logits, _ = forward(lens, tokens)
    scale = float(exact_logits.abs().max())
    differences = {
        point: max(gap(activations[layer, point], exact[layer, point]) for layer in range(lens.info.n_layers))
        for point in ("hook_sink", "hook_entropy")
    }
    other = share_of_other_experts(choices, exact_choices)
    return {
        "lens": lens_error(lens, activations),
        "sink": differences["hook_sink"],
        "entropy": differences["hook_entropy"],
        "logits": gap(logits, exact_logits) / scale,
        "alike": None if other is None else gap(alike_logits, exact_logits) / scale,
        "other": other,
    }


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    columns = ("lens", "sink", "entropy", "logits", "alike", "other")
    print(f"{'model':12} {'dtype':9} " + " ".join(f"{name:>8}" for name in columns))
    for name in options.models:
        for dtype in DTYPES:
            seeds = range(1 if name in BUNDLED else options.seeds)
            results = [measure(name, dtype, options.tokens, seed) for seed in seeds]
            cells = []
            for column in columns:
                values = [result[column] for result in results]
                numbers = [value for value in values if value is not None]
                cells.append(f"{max(numbers):8.0e}" if numbers else f"{'':8}")
            print(f"{name:12} {dtype:9} " + " ".join(cells), flush=True)


if __name__ == "__main__":
    main()
