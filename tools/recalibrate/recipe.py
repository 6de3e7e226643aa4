"""The numbers that determine a recalibration, read from and written to JSON."""

from __future__ import annotations

import dataclasses

from tools.train_pair.recipe import RecipeFile

ENCODINGS = ("nope", "rope")
PRECISIONS = ("bf16", "fp32")
ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
# A run can be continued with other values of these: they determine where it ends, not its steps.
_SCHEDULE_END = ("tokens", "cooldown_tokens", "final_lr_fraction")


@dataclasses.dataclass(frozen=True)
class RecalibrationRecipe(RecipeFile):
    """Everything that determines the trained adapter, apart from the model and the books.

    Attributes:
        positions: ``nope`` nulls the rotation (cos = 1, sin = 0) before training; ``rope`` is the control.
        rank, alpha: the adapter adds alpha / rank · B·A to each weight of `targets`.
        targets: names of the linear modules that get an adapter, in every layer.
        norms: also train the gains of the norms inside the layers.
        batch_tokens: tokens in one optimiser step; sequence lengths go through `lengths` in turn.
        lr: AdamW's learning rate: linear warm-up over `warmup_steps`, then constant, then linear down to
            `final_lr_fraction` of it over the last `cooldown_tokens` of `tokens`.
        start_sha256, start_tokens: digest of the checkpoint or adapter that the adapter starts from, and the tokens it
            was trained on; empty and 0 for a new adapter.
        precision: ``bf16`` keeps frozen weights and matrix products in bfloat16 and the residual stream, the adapter
            and the optimiser in float32.
    """

    positions: str = "nope"
    seed: int = 0
    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ATTENTION_PROJECTIONS
    norms: bool = False
    batch_tokens: int = 2048
    lengths: tuple[int, ...] = (256, 512, 1024)
    lr: float = 1e-3
    warmup_steps: int = 50
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    tokens: int = 20_000_000
    cooldown_tokens: int = 1_000_000
    final_lr_fraction: float = 0.0
    precision: str = "bf16"
    start_sha256: str = ""
    start_tokens: int = 0

    def __post_init__(self) -> None:
        if self.positions not in ENCODINGS:
            raise ValueError(f"positions is {self.positions!r}; use one of {', '.join(ENCODINGS)}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is {self.precision!r}; use one of {', '.join(PRECISIONS)}")
        if not self.lengths or any(length < 2 or self.batch_tokens % length for length in self.lengths):
            raise ValueError(
                f"lengths {self.lengths}: each must be at least 2 and divide batch_tokens={self.batch_tokens}"
            )
        if not 0 <= self.cooldown_tokens <= self.tokens:
            raise ValueError(
                f"cooldown_tokens={self.cooldown_tokens} must lie between 0 and tokens={self.tokens}"
            )

    @property
    def n_steps(self) -> int:
        """The number of whole steps within `tokens`."""
        return self.tokens // self.batch_tokens

    @property
    def end_tokens(self) -> int:
        """The number of tokens that the finished adapter was trained on, those before this run included."""
        return self.start_tokens + self.n_steps * self.batch_tokens

    @property
    def cooldown_start(self) -> int:
        """The first step whose learning rate falls."""
        return self.n_steps - self.cooldown_tokens // self.batch_tokens

    def lr_at(self, step: int) -> float:
        """Return the learning rate of `step`, counted from 0."""
        warmup = min(1.0, (step + 1) / max(self.warmup_steps, 1))
        cooling = self.n_steps - self.cooldown_start
        remaining = min(1.0, (self.n_steps - step) / cooling) if cooling else 1.0
        return self.lr * warmup * (self.final_lr_fraction + (1 - self.final_lr_fraction) * remaining)

    def same_steps(self, recipe: RecalibrationRecipe) -> bool:
        """Return whether both take the same steps before either cools down."""
        shared = {name: getattr(self, name) for name in _SCHEDULE_END}
        return dataclasses.replace(recipe, **shared) == self
