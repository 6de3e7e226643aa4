"""The training loop, which logs, writes checkpoints atomically, and resumes to the bit."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tools.recalibrate import corpus
from tools.recalibrate.loss import next_token_loss
from tools.recalibrate.measure import held_out_loss, sinks_and_spike
from tools.recalibrate.network import adapt, trainable
from tools.recalibrate.recipe import RecalibrationRecipe
from tools.recalibrate.start import starting_values
from tools.train_pair.train import LOG, trim_log

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Upkeep:
    """Intervals at which a run saves and measures. They do not affect the training steps.

    Attributes:
        checkpoint_seconds: wall time between checkpoints.
        keep_tokens: checkpoints at multiples of this are kept; of the others, only the newest.
        log_tokens: tokens between rows with the held-out loss.
        measure_tokens: tokens between rows that also hold sinks, norms, entropy and the BOS-MLP ratio.
        loss_windows, measure_windows, window: held-out windows for the loss and for the rest, and their length.
    """

    checkpoint_seconds: float = 240.0
    keep_tokens: int = 262_144
    log_tokens: int = 131_072
    measure_tokens: int = 524_288
    loss_windows: int = 32
    measure_windows: int = 8
    window: int = 512


class Recalibration:
    """One recalibration in one folder: `checkpoints/STEP.pt`, `log.jsonl`, `recipe.json`.

    Batches are a function of the seed and the step, and nothing else is drawn after the adapter's initial values, so a
    checkpoint holds only the trained parameters, the optimiser's state and the step.

    Args:
        branch_from: folder of another run, whose newest checkpoint before this recipe's cooldown starts this one.
        start_from: checkpoint of another run, or a shipped adapter's folder, from which a new run takes the adapter and
            nothing else. `start.starting_from` returns the recipe that records it.
    """

    def __init__(
        self,
        model: Any,
        bos: int,
        recipe: RecalibrationRecipe,
        folder: Path,
        cache: Path,
        upkeep: Upkeep | None = None,
        branch_from: Path | None = None,
        start_from: Path | None = None,
        compile_layers: bool = False,
    ) -> None:
        self.recipe, self.folder, self.bos, self.upkeep = recipe, folder, bos, upkeep or Upkeep()
        self.device = model.device
        self.stream = corpus.open_stream(cache, "train")
        held_out = corpus.open_stream(cache, "held_out")
        self.loss_texts, self.measure_texts = (
            torch.from_numpy(corpus.held_out_windows(held_out, n, self.upkeep.window, bos)).to(self.device)
            for n in (self.upkeep.loss_windows, self.upkeep.measure_windows)
        )
        head = model.get_output_embeddings().weight.detach()
        self.head = head.bfloat16() if recipe.precision == "bf16" else head
        self.model = model
        self.adapted = adapt(model, recipe)
        self.parameters = trainable(self.adapted)
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=recipe.lr,
            betas=recipe.betas,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        self.step, self.seconds = 0, 0.0
        (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        if start_from is not None and not checkpoints(folder):
            self._load_parameters(starting_values(start_from, self.device))
        self._start(branch_from)
        recipe.write(folder / "recipe.json")
        if compile_layers:
            for layer in model.model.layers:
                layer.compile(dynamic=False)

    @property
    def tokens(self) -> int:
        """Tokens trained on so far, in this run."""
        return self.step * self.recipe.batch_tokens

    def _load_parameters(self, values: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(values[name])

    def _start(self, branch_from: Path | None) -> None:
        """Resume from this folder's newest checkpoint, else from the branch's, else start from step 0."""
        own_checkpoints = checkpoints(self.folder)
        source = self.folder if own_checkpoints else branch_from
        if source is None:
            return
        earlier = RecalibrationRecipe.read(source / "recipe.json")
        if not earlier.same_steps(self.recipe):
            raise ValueError(
                f"{source} was trained with another recipe; choose another --out, or repeat its options"
            )
        if own_checkpoints:
            path = own_checkpoints[max(own_checkpoints)]
            if earlier != self.recipe and max(own_checkpoints) > min(
                earlier.cooldown_start, self.recipe.cooldown_start
            ):
                raise ValueError(
                    f"{source} is at step {max(own_checkpoints)}, in its cooldown; end it elsewhere with "
                    f"another --out and --branch-from {source}"
                )
        else:
            candidates = {
                step: path
                for step, path in checkpoints(source).items()
                if step <= min(earlier.cooldown_start, self.recipe.cooldown_start)
            }
            if not candidates:
                raise ValueError(
                    f"{source} has no checkpoint before step {self.recipe.cooldown_start}, where the cooldown starts"
                )
            path = candidates[max(candidates)]
        state = torch.load(path, map_location=self.device, weights_only=True)
        self._load_parameters(state["parameters"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        if own_checkpoints:
            trim_log(self.folder / LOG, self.step)

    def save(self) -> None:
        """Write a checkpoint atomically, and delete the previous one unless `keep_tokens` keeps it."""
        state = {
            "parameters": {name: parameter.detach() for name, parameter in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        path = self.folder / CHECKPOINTS / f"{self.step:08d}.pt"
        partial = path.with_suffix(".tmp")
        torch.save(state, partial)
        os.replace(partial, path)
        for step, older in checkpoints(self.folder).items():
            if step < self.step and not self._passed(self.upkeep.keep_tokens, step):
                older.unlink()

    def _passed(self, interval: int, step: int) -> bool:
        """Return whether `step` was the first at or after a multiple of `interval` tokens."""
        size = self.recipe.batch_tokens
        return step == 0 or step * size // interval > (step - 1) * size // interval

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.recipe.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    @contextmanager
    def _measuring(self) -> Iterator[None]:
        """Switch to evaluation mode, in the precision of training, without compiling for shapes used only here."""
        self.adapted.eval()
        with torch.no_grad(), self._autocast(), torch.compiler.set_stance("force_eager"):
            yield
        self.adapted.train()

    def log(self, train_loss: float | None, tokens_per_second: float | None) -> dict[str, Any]:
        """Measure, append a row to the log, and return it."""
        row: dict[str, Any] = {
            "step": self.step,
            "tokens": self.recipe.start_tokens + self.tokens,
            "positions": self.recipe.positions,
            "lr": self.recipe.lr_at(max(self.step - 1, 0)),
            "train_loss": train_loss,
            "tokens_per_second": tokens_per_second,
            "seconds": round(self.seconds, 1),
        }
        with self._measuring():
            row["loss"] = held_out_loss(self.model, self.head, self.loss_texts)
            if self._passed(self.upkeep.measure_tokens, self.step) or self.step == self.recipe.n_steps:
                row |= sinks_and_spike(self.model, self.head, self.measure_texts)
        with (self.folder / LOG).open("a", encoding="utf-8") as log_file:
            log_file.write(json.dumps(row) + "\n")
        return row

    def train_step(self) -> float:
        """Train on one batch and return its loss. A non-finite gradient stops the run."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr_at(self.step)
        rows = corpus.batch(self.stream, self.recipe, self.bos, self.step)
        tokens = torch.from_numpy(rows).to(self.device)
        with self._autocast():
            hidden = self.model.model(tokens, use_cache=False).last_hidden_state
        loss = next_token_loss(hidden, self.head, tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(
            list(self.parameters.values()), self.recipe.grad_clip, error_if_nonfinite=True
        )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss.item()

    def run(self, stop_step: int | None = None) -> None:
        """Train to the recipe's last step, or to `stop_step` if that comes first, and leave a checkpoint there."""
        end = self.recipe.n_steps if stop_step is None else min(stop_step, self.recipe.n_steps)
        self.adapted.train()
        if self.step == 0 and not checkpoints(self.folder):
            print(_line(self.log(None, None)), flush=True)
            self.save()
        losses: list[float] = []
        training_seconds, saved = 0.0, time.monotonic()
        while self.step < end:
            started = time.monotonic()
            losses.append(self.train_step())
            training_seconds += time.monotonic() - started
            self.seconds += time.monotonic() - started
            if self.step == end or self._passed(self.upkeep.log_tokens, self.step):
                rate = len(losses) * self.recipe.batch_tokens / training_seconds
                print(_line(self.log(sum(losses) / len(losses), round(rate, 1))), flush=True)
                losses, training_seconds = [], 0.0
            overdue = time.monotonic() - saved > self.upkeep.checkpoint_seconds
            if overdue or self.step == end or self._passed(self.upkeep.keep_tokens, self.step):
                self.save()
                saved = time.monotonic()


def checkpoints(folder: Path) -> dict[int, Path]:
    """Return the checkpoints of a run by step."""
    return {int(path.stem): path for path in (folder / CHECKPOINTS).glob("*.pt")}


def _line(row: dict[str, Any]) -> str:
    numbers = {key: value for key, value in row.items() if isinstance(value, int | float)}
    return f"{row['positions']} " + " ".join(f"{key} {value:.5g}" for key, value in numbers.items())
