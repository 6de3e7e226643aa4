"""Helpers for tests of ablations: runs, and references by TransformerLens' hooks and torch's cross-entropy."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

import phaselens
from phaselens.plugin import Metric, Plugins
from phaselens.runs import Run
from tests.toys import letters

TEXTS = [letters(9), letters(24, 3), letters(2, 5), letters(15, 11)]


def run(metric: str | type[Metric[Any]], lens: Any, texts: list[str] = TEXTS, **options: Any) -> Run:
    """Run one metric, by its name or class, with the parameters `params`, and require that it does not fail."""
    params = options.pop("params", {})
    metric_class = Plugins().metric(metric) if isinstance(metric, str) else metric
    result = phaselens.run(lens, metrics=[(metric_class, params)], texts=texts, **options)
    assert not result.failed, [str(failure) for failure in result.metrics[metric_class.name].failures]
    return result


def rows(result: Run, metric: str, table: str = "conditions") -> list[dict[str, Any]]:
    """Return the records of one table."""
    return result.rows(metric, table).records()


def row(
    result: Run, metric: str, condition: str, layer: int | None = None, table: str = "conditions"
) -> dict[str, Any]:
    """Return the record of one condition."""
    (match,) = [
        record
        for record in rows(result, metric, table)
        if record["condition"] == condition and layer in (None, record["layer"])
    ]
    return match


def notes(result: Run, *words: str) -> list[str]:
    """Return the warnings that contain all these words."""
    return [note for note in result.warnings if all(word in note for word in words)]


def zero_at(position: int | None) -> Any:
    """Return a TransformerLens hook that zeroes one position, or all."""

    def hook(tensor: torch.Tensor, hook: Any) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[:, slice(None) if position is None else position] = 0.0
        return tensor

    return hook


def naive(lens: Any, points: Iterable[str], position: Any = 0, texts: list[str] = TEXTS) -> np.ndarray:
    """Return the mean loss [text] in nats with `points` zeroed at `position`, by one whole forward per text.

    `position` may be None for all, or a function of length and text.
    """
    losses = []
    for text in texts:
        ids = torch.tensor([lens.text_tokenizer(text)["input_ids"]])
        zeroed_position = position(ids.shape[1], text) if callable(position) else position
        hooks = [(point, zero_at(zeroed_position)) for point in points]
        with torch.no_grad():
            logits = lens.run_with_hooks(ids, fwd_hooks=hooks)
        losses.append(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).item())
    return np.array(losses)


def predicted(lens: Any, texts: list[str] = TEXTS) -> np.ndarray:
    """Return the number of predicted tokens [text]."""
    return np.array([len(lens.text_tokenizer(text)["input_ids"]) - 1 for text in texts])


def perplexity(losses: np.ndarray, weights: np.ndarray) -> float:
    """Return exp of the weighted mean loss."""
    return float(np.exp((losses * weights).sum() / weights.sum()))


def content(text: str) -> str:
    """Return the hash of a text's content, which seeds its draws."""
    return hashlib.sha256(text.encode()).hexdigest()
