"""Recalibrate a rotary model by next-token training of a low-rank adapter, with its rotation nulled or in place.

A killed run resumes from its last checkpoint when it is started again with the same arguments. The learning rate stays
constant up to the last --cooldown-tokens, so a run can be ended from any of its kept checkpoints: call it with another
--out, a smaller --tokens and --branch-from RUN.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch
from tools.recalibrate import corpus, network
from tools.recalibrate.recipe import ENCODINGS, PRECISIONS, RecalibrationRecipe
from tools.recalibrate.start import starting_from
from tools.recalibrate.train import Recalibration, Upkeep
from tools.train_pair.corpus import HELD_OUT


def parser() -> argparse.ArgumentParser:
    default, upkeep = RecalibrationRecipe(), Upkeep()
    p = argparse.ArgumentParser(prog="python -m tools.recalibrate", description=__doc__)
    p.add_argument("model", help="checkpoint folder, hub id, or a name that phaselens.load takes")
    p.add_argument("--positions", choices=ENCODINGS, default=default.positions)
    p.add_argument("--corpus", type=Path, required=True, help="folder of .txt books")
    p.add_argument("--out", type=Path, required=True, help="checkpoints, log and the finished adapter")
    p.add_argument("--cache", type=Path, help="token streams (default: OUT/cache); twins can share one")
    p.add_argument(
        "--held-out", nargs="+", default=list(HELD_OUT), help="books (without .txt) never trained on"
    )
    p.add_argument(
        "--branch-from", type=Path, help="start from another run's newest checkpoint before the cooldown"
    )
    p.add_argument(
        "--start-from",
        type=Path,
        metavar="CHECKPOINT",
        help="initial adapter: a checkpoint (.pt) of another run, whose recipe may differ, or the folder of an adapter",
    )
    p.add_argument("--rank", type=int, default=default.rank)
    p.add_argument("--alpha", type=float, default=default.alpha)
    p.add_argument(
        "--targets", nargs="+", default=list(default.targets), help="linear modules that are adapted"
    )
    p.add_argument("--norms", action="store_true", help="train the norms' gains too")
    p.add_argument("--lr", type=float, default=default.lr)
    p.add_argument("--betas", type=float, nargs=2, default=list(default.betas))
    p.add_argument("--warmup-steps", type=int, default=default.warmup_steps)
    p.add_argument("--seed", type=int, default=default.seed)
    p.add_argument("--batch-tokens", type=int, default=default.batch_tokens)
    p.add_argument("--lengths", type=int, nargs="+", default=list(default.lengths))
    p.add_argument("--tokens", type=int, default=default.tokens)
    p.add_argument("--cooldown-tokens", type=int, default=default.cooldown_tokens)
    p.add_argument("--precision", choices=PRECISIONS, default=default.precision)
    p.add_argument("--stop-step", type=int, help="stop there, with a checkpoint, without ending the schedule")
    p.add_argument("--checkpoint-seconds", type=float, default=upkeep.checkpoint_seconds)
    p.add_argument("--keep-tokens", type=int, default=upkeep.keep_tokens)
    p.add_argument("--log-tokens", type=int, default=upkeep.log_tokens)
    p.add_argument("--measure-tokens", type=int, default=upkeep.measure_tokens)
    p.add_argument("--loss-windows", type=int, default=upkeep.loss_windows)
    p.add_argument("--measure-windows", type=int, default=upkeep.measure_windows)
    p.add_argument("--window", type=int, default=upkeep.window)
    p.add_argument("--compile", action="store_true", help="compile the layers: faster after some minutes")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--device", default="cpu")
    return p


def main(argv: list[str] | None = None) -> Recalibration:
    args = parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    options = vars(args)
    recipe = RecalibrationRecipe.from_dict(
        {f.name: options[f.name] for f in dataclasses.fields(RecalibrationRecipe) if f.name in options}
    )
    if args.start_from is not None:
        recipe = starting_from(recipe, args.start_from)
    upkeep = Upkeep(**{f.name: options[f.name] for f in dataclasses.fields(Upkeep)})
    model, tokenizer = network.load(args.model, args.device)
    cache = args.cache or args.out / "cache"
    corpus.prepare(args.corpus, cache, tuple(args.held_out), tokenizer)
    run = Recalibration(
        model,
        tokenizer.bos_token_id,
        recipe,
        args.out,
        cache,
        upkeep,
        branch_from=args.branch_from,
        start_from=args.start_from,
        compile_layers=args.compile,
    )
    run.run(args.stop_step)
    if run.step == recipe.n_steps:
        run.adapted.save_pretrained(args.out / "adapter")
    return run


if __name__ == "__main__":
    main()
