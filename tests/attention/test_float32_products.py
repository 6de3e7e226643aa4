"""Whether float32 products are exact, as torch is set."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from phaselens.attention._float32_products import products_are_exact


@pytest.mark.parametrize(
    ("precision", "is_exact"), [("none", True), ("ieee", True), ("tf32", False), ("bf16", False)]
)
def test_each_device_has_its_own_setting(
    monkeypatch: pytest.MonkeyPatch, precision: str, is_exact: bool
) -> None:
    other = SimpleNamespace(matmul=SimpleNamespace(fp32_precision="tf32" if is_exact else "ieee"))
    setting = SimpleNamespace(matmul=SimpleNamespace(fp32_precision=precision))
    for device, own_name, other_name in (("cuda", "cuda", "mkldnn"), ("cpu", "mkldnn", "cuda")):
        monkeypatch.setattr(torch.backends, own_name, setting)
        monkeypatch.setattr(torch.backends, other_name, other)
        assert products_are_exact(torch.device(device)) is is_exact


@pytest.mark.parametrize("backend", [SimpleNamespace(), SimpleNamespace(matmul=SimpleNamespace())])
@pytest.mark.parametrize(("precision", "is_exact"), [("highest", True), ("high", False), ("medium", False)])
def test_older_versions_of_torch_have_one_setting(
    monkeypatch: pytest.MonkeyPatch, backend: SimpleNamespace, precision: str, is_exact: bool
) -> None:
    monkeypatch.setattr(torch.backends, "mkldnn", backend)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    assert products_are_exact(torch.device("cpu")) is is_exact
