"""Tiny models of each family, and the result of their own eager attention in float64."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import phaselens
from phaselens.testing import tiny_model

LENGTH = 24


@dataclass(frozen=True)
class DenseOutput:
    """The model's own result in float64: logits, and for each layer the pattern [batch, head, query, key]."""

    logits: Tensor
    patterns: tuple[Tensor, ...]


def text(batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(2, 67, (batch, length), generator=torch.Generator().manual_seed(7))


@functools.cache
def dense(family: str) -> DenseOutput:
    model = tiny_model(family, dtype=torch.float64)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(text(), output_attentions=True, use_cache=False)
    return DenseOutput(output.logits, tuple(output.attentions))


@functools.cache
def lens_of(family: str, **overrides):
    return phaselens.load(tiny_model(family, **overrides), label=family)


@pytest.fixture
def tokens() -> Tensor:
    return text()


@pytest.fixture
def read_for_digests(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read for their digests since the test began, in order."""
    files: list[Path] = []
    digest = hashlib.file_digest

    def record(handle: Any, algorithm: str) -> Any:
        files.append(Path(handle.name))
        return digest(handle, algorithm)

    monkeypatch.setattr(hashlib, "file_digest", record)
    return files


def by_distance(pattern: Tensor, n: int) -> Tensor:
    """Return [batch, head, distance]: the sum over the cells of a square pattern by distance from query back to key."""
    position = torch.arange(pattern.shape[-1])
    distances = position[:, None] - position[None, :]
    return torch.stack([(pattern * (distances == distance)).sum((-2, -1)) for distance in range(n)], -1)
