"""Every family loads in each dtype, and its statistics are those of its own queries and keys in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import phaselens
from phaselens.lens import run_checks
from phaselens.testing import FAMILIES, tiny_model
from tests.lens.mixtures import DTYPES, MIXTURES, tiny_mixture

# In float32, `test_families` checks these families; the variants of DroPE compute alike.
DENSE = [name for name in FAMILIES if "drope" not in name or "qk-norm" in name]
QUICK = {("mixtral", torch.bfloat16), ("gpt_oss", torch.float16), ("gemma2", torch.bfloat16)}
CASES = [
    pytest.param(name, dtype, marks=() if (name, dtype) in QUICK else pytest.mark.slow)
    for name in (*DENSE, *MIXTURES)
    for dtype in (DTYPES if name in MIXTURES else DTYPES[1:])
]


def model_of(name: str, dtype: torch.dtype, **options: Any) -> Any:
    return (tiny_mixture if name in MIXTURES else tiny_model)(name, dtype=dtype, **options)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_the_full_check_passes_in_each_dtype(name: str, dtype: torch.dtype) -> None:
    lens = phaselens.load(model_of(name, dtype))
    assert lens.dtype == dtype
    assert not [result for result in run_checks(lens) if not result.ok]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "glm4_moe", "gemma2"])
def test_rounding_does_not_accumulate_into_a_refusal(name: str, dtype: torch.dtype) -> None:
    for seed in range(3):
        layers = {"num_hidden_layers": 16}
        if name == "gpt_oss":
            layers["layer_types"] = ["sliding_attention", "full_attention"] * 8  # type: ignore[assignment]
        phaselens.load(model_of(name, dtype, seed=seed, **layers))
