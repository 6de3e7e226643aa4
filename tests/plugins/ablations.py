"""What the tests of ablations share: runs, and the same by TransformerLens' hooks and torch's cross-entropy."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

import phaselens
from phaselens.plugin import Plugins
from phaselens.runs import Run
from tests.toys import letters

TEXTS = [letters(9), letters(24, 3), letters(2, 5), letters(15, 11)]


def run(metric: str, lens: Any, texts: list[str] = TEXTS, **options: Any) -> Run:
    """One metric (its parameters are `params`), complete."""
    params = options.pop("params", {})
    found = phaselens.run(lens, metrics=[(Plugins().metric(metric), params)], texts=texts, **options)
    assert not found.failed, [str(one) for one in found.metrics[metric].failures]
    return found


def rows(found: Run, metric: str, table: str = "conditions") -> list[dict[str, Any]]:
    """Records of one table."""
    return found.rows(metric, table).records()


def row(
    found: Run, metric: str, condition: str, layer: int | None = None, table: str = "conditions"
) -> dict[str, Any]:
    """The record of one condition."""
    (one,) = [
        record
        for record in rows(found, metric, table)
        if record["condition"] == condition and layer in (None, record["layer"])
    ]
    return one


def notes(found: Run, *words: str) -> list[str]:
    """Warnings that have all these words."""
    return [note for note in found.warnings if all(word in note for word in words)]


def zero_at(position: int | None) -> Any:
    """A TransformerLens hook: zeroes one position, or all."""

    def hook(tensor: torch.Tensor, hook: Any) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[:, slice(None) if position is None else position] = 0.0
        return tensor

    return hook


def naive(lens: Any, points: Iterable[str], place: Any = 0, texts: list[str] = TEXTS) -> np.ndarray:
    """Mean loss [text] in nats with `points` zeroed at `place` (a position, None for all, or a function of length and
    text): one whole forward a text."""
    losses = []
    for text in texts:
        ids = torch.tensor([lens.text_tokenizer(text)["input_ids"]])
        at = place(ids.shape[1], text) if callable(place) else place
        hooks = [(point, zero_at(at)) for point in points]
        with torch.no_grad():
            logits = lens.run_with_hooks(ids, fwd_hooks=hooks)
        losses.append(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).item())
    return np.array(losses)


def predicted(lens: Any, texts: list[str] = TEXTS) -> np.ndarray:
    """Predicted tokens [text]."""
    return np.array([len(lens.text_tokenizer(text)["input_ids"]) - 1 for text in texts])


def perplexity(losses: np.ndarray, weights: np.ndarray) -> float:
    """exp of the weighted mean."""
    return float(np.exp((losses * weights).sum() / weights.sum()))


def content(text: str) -> str:
    """The hash by which a text's draws are made."""
    return hashlib.sha256(text.encode()).hexdigest()
