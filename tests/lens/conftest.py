"""Tiny models of each family, and what their own eager attention says in float64."""

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
class Dense:
    """The model's own float64 answer: logits, and per layer the whole pattern [batch, head, query, key]."""

    logits: Tensor
    patterns: tuple[Tensor, ...]


def text(batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(2, 67, (batch, length), generator=torch.Generator().manual_seed(7))


@functools.cache
def dense(family: str) -> Dense:
    model = tiny_model(family, dtype=torch.float64)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(text(), output_attentions=True, use_cache=False)
    return Dense(out.logits, tuple(out.attentions))


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

    def counted(handle: Any, algorithm: str) -> Any:
        files.append(Path(handle.name))
        return digest(handle, algorithm)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    return files


def by_distance(pattern: Tensor, n: int) -> Tensor:
    """[batch, head, distance]: the sum over cells of a square pattern whose key is so many before the query."""
    position = torch.arange(pattern.shape[-1])
    back = position[:, None] - position[None, :]
    return torch.stack([(pattern * (back == distance)).sum((-2, -1)) for distance in range(n)], -1)
