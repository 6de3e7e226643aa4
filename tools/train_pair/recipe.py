"""Every number that determines a trained pair, read from and written to JSON."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Self


@dataclasses.dataclass(frozen=True)
class RecipeFile:
    """Base of recipes: copies with changes, and reading and writing JSON, where tuples are lists."""

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some values changed; an unknown name raises TypeError."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Return the recipe with these values and the defaults for all others.

        Raises:
            ValueError: for a name that is not in the recipe.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - names):
            raise ValueError(f"unknown recipe entries {unknown}; known: {sorted(names)}")
        return cls(
            **{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        )

    @classmethod
    def read(cls, path: Path) -> Self:
        return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class PairRecipe(RecipeFile):
    """The pair's training. Sizes are in tokens unless the name says steps; learning rates are AdamW's."""

    seed: int = 0
    vocab_size: int = 2048
    n_layers: int = 4
    n_heads: int = 4
    d_model: int = 128
    d_mlp: int = 352
    max_positions: int = 512
    rope_theta: float = 10_000.0
    batch_tokens: int = 4096
    late_from_step: int | None = None
    late_batch_tokens: int | None = None
    late_weight_decay: float | None = None
    lengths: tuple[int, ...] = (128, 256, 512)
    copy_rate: float = 0.12
    copy_depth: int = 1
    lr: float = 3e-3
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_steps: int = 200
    grad_clip: float = 1.0
    trunk_tokens: int = 40_000_000
    twin_tokens: int = 12_000_000
    decay_tokens: int = 6_000_000
    final_lr_fraction: float = 0.1
    log_tokens: int = 250_000
    checkpoint_tokens: int = 400_000
    snapshot_tokens: int = 1_000_000

    def __post_init__(self) -> None:
        for length in self.lengths:
            sizes = (self.batch_tokens, self.late_batch_tokens or self.batch_tokens)
            if any(size % length for size in sizes) or length > self.max_positions:
                raise ValueError(
                    f"sequence length {length} must divide batch_tokens={self.batch_tokens} and "
                    f"late_batch_tokens={self.late_batch_tokens}, and not exceed {self.max_positions} positions"
                )
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model={self.d_model} is not a multiple of n_heads={self.n_heads}")
        if not 0 <= self.copy_rate < 1 or self.copy_depth < 1:
            raise ValueError(
                f"copy_rate={self.copy_rate} must be in [0, 1), copy_depth={self.copy_depth} >= 1"
            )
        if self.decay_tokens > self.twin_tokens:
            raise ValueError(f"decay_tokens={self.decay_tokens} exceeds twin_tokens={self.twin_tokens}")

    def batch_at(self, step: int) -> int:
        """Return the number of tokens in the batch of `step`."""
        return self.late_batch_tokens or self.batch_tokens if self.is_late(step) else self.batch_tokens

    def weight_decay_at(self, step: int) -> float:
        """Return the weight decay of the matrices in `step`."""
        late_decay = self.late_weight_decay if self.is_late(step) else None
        return self.weight_decay if late_decay is None else late_decay

    def is_late(self, step: int) -> bool:
        """Return whether the late_… values that are set apply in `step`."""
        return self.late_from_step is not None and step >= self.late_from_step

    def tokens_at(self, step: int) -> int:
        """Return the number of tokens seen in the first `step` steps."""
        early_steps = step if self.late_from_step is None else min(step, self.late_from_step)
        return early_steps * self.batch_tokens + (step - early_steps) * (
            self.late_batch_tokens or self.batch_tokens
        )

    def trunk_lr(self, step: int) -> float:
        """Return the trunk's learning rate: linear warm-up, then constant."""
        return self.lr * min(1.0, (step + 1) / self.warmup_steps)

    def twin_lr(self, tokens: int) -> float:
        """Return a twin's learning rate at `tokens` since the branch: constant, then linear to `final_lr_fraction`."""
        remaining = self.twin_tokens - tokens
        if remaining >= self.decay_tokens:
            return self.lr
        return self.lr * (
            self.final_lr_fraction + (1 - self.final_lr_fraction) * remaining / self.decay_tokens
        )
