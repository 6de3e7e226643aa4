"""The tiny models of `phaselens.testing`."""

from __future__ import annotations

import torch

from phaselens.testing import tiny_model


def test_the_weights_do_not_depend_on_torchs_default_dtype() -> None:
    expected = tiny_model("llama").state_dict()
    torch.set_default_dtype(torch.float64)
    try:
        weights = tiny_model("llama").state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    assert {name: value.dtype for name, value in weights.items()} == dict.fromkeys(expected, torch.float32)
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
