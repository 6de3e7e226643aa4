"""Tiny models in float64, and an experiment on each."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from phaselens.patching import Experiment, logit_diff, prompt
from phaselens.testing import tiny_lens


@functools.cache
def lens_of(family: str, **options: Any) -> Any:
    return tiny_lens(family, dtype=torch.float64, num_hidden_layers=3, **options)


def experiment_of(family: str = "llama", clean: str = "to be or", corrupt: str = "to do or") -> Experiment:
    lens = lens_of(family)
    return Experiment(prompt(lens, clean), prompt(lens, corrupt), logit_diff(lens, "e", "o"))


@pytest.fixture
def experiment() -> Any:
    """Yield an experiment whose edits are undone at the end, since tests share the lens."""
    experiment = experiment_of()
    yield experiment
    while experiment.patched():
        experiment.undo()
