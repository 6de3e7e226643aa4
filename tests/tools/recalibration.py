"""A recalibration small enough for tests: a rank of 2, a dozen steps of 64 tokens."""

from __future__ import annotations

from tools.recalibrate.recipe import RecalibrationRecipe
from tools.recalibrate.train import Upkeep

BOS = 0
TINY = RecalibrationRecipe(
    rank=2,
    alpha=4.0,
    batch_tokens=64,
    lengths=(16, 32),
    lr=1e-2,
    warmup_steps=2,
    tokens=12 * 64,
    cooldown_tokens=4 * 64,
    precision="fp32",
)
OFTEN = Upkeep(
    checkpoint_seconds=1e9,
    keep_tokens=4 * 64,
    log_tokens=2 * 64,
    measure_tokens=6 * 64,
    loss_windows=4,
    measure_windows=2,
    window=32,
)
