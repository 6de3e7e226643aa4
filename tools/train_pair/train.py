"""The training loop, which logs, writes checkpoints atomically, and resumes in the same data order."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as functional
from safetensors.torch import save_file
from tools.train_pair import batches, corpus
from tools.train_pair.measure import measure
from tools.train_pair.model import build, null_rotation
from tools.train_pair.recipe import PairRecipe
from transformers import LlamaForCausalLM

Phase = Literal["trunk", "rope", "drope"]
CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"


def optimizer_for(model: LlamaForCausalLM, recipe: PairRecipe) -> torch.optim.AdamW:
    """Make AdamW with weight decay on matrices only, not on the gains of norms."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    gains = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": gains, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, fused=True)


class PairTraining:
    """One phase of the recipe in one folder: `checkpoint.pt`, `log.jsonl`, `snapshots/`.

    `step` counts optimiser steps since the start of the trunk, so the data order runs on through the branch.
    A twin starts from the trunk's checkpoint, optimiser state included.
    """

    def __init__(
        self,
        recipe: PairRecipe,
        phase: Phase,
        folder: Path,
        cache: Path,
        trunk: Path | None = None,
        device: str = "cpu",
    ) -> None:
        self.recipe, self.phase, self.folder, self.device = recipe, phase, folder, device
        self.stream = corpus.open_stream(cache, "train")
        windows = corpus.held_out_windows(
            corpus.open_stream(cache, "held_out"), 32, min(256, recipe.max_positions)
        )
        self.texts = torch.from_numpy(windows).to(device)
        self.model = build(recipe).to(device)
        self.optimizer = optimizer_for(self.model, recipe)
        self.step, self.branch_step, self.seconds = 0, 0, 0.0
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "snapshots").mkdir(exist_ok=True)
        own_checkpoint = folder / CHECKPOINT
        if own_checkpoint.exists():
            self._load(own_checkpoint)
            trim_log(self.folder / LOG, self.step)
        elif phase != "trunk":
            if trunk is None:
                raise ValueError(f"{phase} starts from a trunk's checkpoint; give the trunk's folder")
            self._load(trunk / CHECKPOINT)
            self.branch_step, self.seconds = self.step, 0.0
        if phase == "drope":
            null_rotation(self.model)
        recipe.write(folder / "recipe.json")

    def _load(self, path: Path) -> None:
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.branch_step, self.seconds = state["step"], state["branch_step"], state["seconds"]

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "branch_step": self.branch_step,
            "seconds": self.seconds,
        }
        partial = self.folder / f"{CHECKPOINT}.tmp"
        torch.save(state, partial)
        os.replace(partial, self.folder / CHECKPOINT)

    def snapshot(self) -> None:
        """Write the weights alone, in float16, so that any curve can be measured again later."""
        weights = {name: t.detach().to("cpu", torch.float16) for name, t in self.model.state_dict().items()}
        name = f"{self.recipe.tokens_at(self.step):010d}.safetensors"
        partial = self.folder / "snapshots" / f"{name}.tmp"
        save_file(weights, partial)
        os.replace(partial, partial.with_suffix(""))

    def log(self, train_loss: float | None) -> dict[str, Any]:
        tokens = self.recipe.tokens_at(self.step)
        row: dict[str, Any] = {
            "phase": self.phase,
            "step": self.step,
            "tokens": tokens,
            "train_loss": train_loss,
        }
        row |= {"seconds": round(self.seconds, 1), "lr": self.lr(), **measure(self.model, self.texts)}
        with (self.folder / LOG).open("a", encoding="utf-8") as log_file:
            log_file.write(json.dumps(row) + "\n")
        return row

    def lr(self) -> float:
        """Return the learning rate of the next step."""
        if self.phase == "trunk":
            return self.recipe.trunk_lr(self.step)
        return self.recipe.twin_lr(self.recipe.tokens_at(self.step) - self.recipe.tokens_at(self.branch_step))

    def train_step(self) -> float:
        """Train on one batch and return its loss. A non-finite loss stops the run."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr()
        self.optimizer.param_groups[0]["weight_decay"] = self.recipe.weight_decay_at(self.step)
        tokens = torch.from_numpy(batches.batch(self.stream, self.recipe, self.step)).to(self.device)
        # Shifting before the unembedding keeps the slice's backward d_model wide, not vocabulary wide.
        hidden = self.model.model(tokens, use_cache=False).last_hidden_state
        logits = self.model.lm_head(hidden[:, :-1].flatten(0, 1))
        loss = functional.cross_entropy(logits, tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), self.recipe.grad_clip, error_if_nonfinite=True
        )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss.item()

    def is_finished(self, step: int) -> bool:
        """Return whether the phase ends after `step` steps: another batch would exceed its tokens."""
        next_tokens = self.recipe.tokens_at(step + 1)
        if self.phase == "trunk":
            return next_tokens > self.recipe.trunk_tokens
        return next_tokens > self.recipe.tokens_at(self.branch_step) + self.recipe.twin_tokens

    def is_due(self, interval: int) -> bool:
        """Return whether the last step went past a multiple of `interval` tokens."""
        return self.recipe.tokens_at(self.step) // interval > self.recipe.tokens_at(self.step - 1) // interval

    def run(self, stop_step: int | None = None) -> None:
        """Train to the phase's end (or `stop_step`), whichever comes first, and leave a checkpoint there."""
        start, done_before = time.monotonic(), self.seconds
        if self.step == self.branch_step and not (self.folder / CHECKPOINT).exists():
            self.log(None)
            self.save()
            self.snapshot()
        running: list[float] = []
        while not self.is_finished(self.step) and (stop_step is None or self.step < stop_step):
            running.append(self.train_step())
            self.seconds = done_before + time.monotonic() - start
            is_last = self.is_finished(self.step) or self.step == stop_step
            # The first steps after a start or a branch change fastest: 1, 2, 4, 8, … are logged as well.
            n_since = self.step - self.branch_step
            if is_last or self.is_due(self.recipe.log_tokens) or n_since & (n_since - 1) == 0:
                row = self.log(sum(running) / len(running))
                running.clear()
                print(_line(row), flush=True)
            if is_last or self.is_due(self.recipe.snapshot_tokens):
                self.snapshot()
            if is_last or self.is_due(self.recipe.checkpoint_tokens):
                self.save()


def trim_log(log: Path, step: int) -> None:
    """Drop the log's rows after `step`, and an incomplete last line: a resumed run takes those steps again."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    remaining_lines = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    partial = log.with_suffix(".tmp")
    partial.write_text("".join(f"{line}\n" for line in remaining_lines), encoding="utf-8")
    os.replace(partial, log)


def _line(row: dict[str, Any]) -> str:
    heads = sorted((v for layer in row["sink"][1:] for v in layer), reverse=True)[:6]
    return (
        f"{row['phase']} {row['tokens'] / 1e6:.2f}M {row['seconds']:.0f}s train {row['train_loss']:.3f} "
        f"held-out {row['loss']:.3f} sinks {[round(v, 2) for v in heads]} "
        f"BOS {[round(v, 1) for v in row['bos_ratio']]} H {[round(v, 2) for v in row['entropy']]}"
    )
