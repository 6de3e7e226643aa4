"""The devices and cards that FlexAttention is compiled for."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from phaselens.attention import _flex
from phaselens.attention._problem import Problem
from tests.attention.reference import random_qkv

N, BAND = 130, {"scale": 0.3, "window": 5}
CUDA = torch.device("cuda", 1)


@pytest.mark.parametrize(("major", "is_new"), [(7, False), (8, True), (9, True)])
def test_cards_from_ampere_on_are_new_enough(
    monkeypatch: pytest.MonkeyPatch, major: int, is_new: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", {CUDA: (major, 0)}.__getitem__)
    monkeypatch.setattr(_flex, "_has_triton", lambda: True)
    assert _flex.is_available(CUDA) is is_new


def test_kernels_need_a_gpu_and_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_flex, "is_ampere", lambda device: True)
    monkeypatch.setattr(_flex, "_has_triton", lambda: True)
    assert _flex.is_available(CUDA)
    assert not _flex.is_available(torch.device("cpu"))
    monkeypatch.setattr(_flex, "_has_triton", lambda: False)
    assert not _flex.is_available(CUDA)


def test_triton_is_looked_for_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for spec in (None, object()):
        monkeypatch.setattr(importlib.util, "find_spec", {"triton": spec}.__getitem__)
        assert _flex._has_triton.__wrapped__() is (spec is not None)


@pytest.mark.parametrize(
    ("options", "sizes", "is_served"),
    [
        ({}, {}, True),
        ({"scale": 0.0}, {}, False),
        ({"mask": torch.ones(1, 1, N, N, dtype=torch.bool).tril()}, {}, False),
        ({"bias": torch.ones(1, 1, 1, N)}, {}, False),
        ({"hidden_keys": torch.tensor([[0]])}, {}, False),
        ({}, {"d": 256}, True),
        ({}, {"d": 257, "d_v": 64}, False),
        ({}, {"d": 64, "d_v": 257}, False),
        ({}, {"d": 16}, True),
        ({}, {"d": 15}, False),
    ],
)
def test_only_bands_of_common_sizes_are_served(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, object], sizes: dict[str, int], is_served: bool
) -> None:
    monkeypatch.setattr(_flex, "is_available", lambda device: True)
    q, k, v = random_qkv(N, batch=1, kv_heads=1, **{"d": 32, **sizes})
    assert _flex.serves(Problem(q, k, **{**BAND, **options}), v) is is_served
