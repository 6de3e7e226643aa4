"""The devices and cards that FlexAttention is compiled for."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from phaselens.attention import _flex

CUDA = torch.device("cuda", 1)


@pytest.mark.parametrize(("major", "is_new"), [(7, False), (8, True), (9, True)])
def test_cards_from_ampere_on_are_new_enough(
    monkeypatch: pytest.MonkeyPatch, major: int, is_new: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", {CUDA: (major, 0)}.__getitem__)
    assert _flex.is_ampere(CUDA) is is_new
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
