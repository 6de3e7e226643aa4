"""The model cards, filled with what was measured on the exported weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ABOUT = {
    "rope": (
        "Its twin is `drope`: the same weights up to the branch, then the rotation nulled, and trained on "
        "for the same tokens in the same order. The two differ in position and in nothing else."
    ),
    "drope": (
        "It is the DroPE twin of `rope`: that model's checkpoint at {branch:.1f} M tokens with the rotation "
        "nulled (cos = 1, sin = 0; `model_type: llama_drope`, `attention_type: nope`), recalibrated on the "
        "same {twin:.1f} M tokens, in the same order and at the same learning rates, that `rope` was trained "
        "on from there. After `import phaselens`, transformers' `AutoModelForCausalLM` loads it without "
        "remote code."
    ),
}
TEMPLATE = Path(__file__).with_name("card.md")


def _list(values: list[float], digits: int) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)


def _weight_decay(recipe: dict[str, Any]) -> str:
    """Describe the weight decay, and its change during training if there was one."""
    late_decay = recipe["late_weight_decay"]
    if recipe["late_from_step"] is None or late_decay is None:
        return f"weight decay {recipe['weight_decay']} on matrices"
    early_decay, change_step = recipe["weight_decay"], recipe["late_from_step"]
    return f"weight decay {early_decay} on matrices up to step {change_step} and {late_decay} from there"


def model_card(twin: str, facts: dict[str, Any]) -> str:
    """Return the README of `twin`, "rope" or "drope", from the facts that `export` gathers."""
    recipe, metrics = facts["recipe"], facts[twin]
    other_twin = "drope" if twin == "rope" else "rope"
    past = sorted((value for layer in metrics["sink"][1:] for value in layer), reverse=True)
    depth = recipe["copy_depth"]
    values = {
        "twin_name": twin,
        "kind": "rotary positions" if twin == "rope" else "no positions",
        "million": metrics["parameters"] / 1e6,
        "n_layers": recipe["n_layers"],
        "n_heads": recipe["n_heads"],
        "d_model": recipe["d_model"],
        "branch": metrics["branch_tokens"] / 1e6,
        "twin": (metrics["trained_tokens"] - metrics["branch_tokens"]) / 1e6,
        "trained": metrics["trained_tokens"] / 1e6,
        "n_books": len(facts["books"]["training"]),
        "stream": facts["books"]["train_tokens"] / 1e6,
        "vocab": recipe["vocab_size"],
        "lengths": ", ".join(map(str, recipe["lengths"])),
        "copy_percent": 100 * recipe["copy_rate"],
        "marks": "a copy mark" if depth == 1 else f"k copy marks (k from 1 to {depth})",
        "copied": "themselves" if depth == 1 else "the k-th token back",
        "betas": tuple(recipe["betas"]),
        "weight_decay": _weight_decay(recipe),
        "lr": recipe["lr"],
        "decay": recipe["decay_tokens"] / 1e6,
        "final_percent": 100 * recipe["final_lr_fraction"],
        "batch": recipe["batch_tokens"],
        "clip": recipe["grad_clip"],
        "n_texts": metrics["n_texts"],
        "text_tokens": metrics["text_tokens"],
        "loss": metrics["loss"],
        "other": other_twin,
        "other_loss": facts[other_twin]["loss"],
        "n_sinks": sum(value >= 0.3 for value in past),
        "n_past": len(past),
        "sinks": _list(past[:8], 2) + (", …" if len(past) > 8 else ""),
        "bos": _list(metrics["bos_ratio"], 1),
        "entropy": _list(metrics["entropy"], 2),
        "positions": recipe["max_positions"],
    }
    values["about"] = ABOUT[twin].format(**values)
    return TEMPLATE.read_text(encoding="utf-8").format(**values)
