"""Make the bundled pair from a folder of books: tokenizer, trunk, both twins, and the two folders to ship.

A killed run resumes from its last checkpoint when it is started again with the same arguments.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tools.train_pair import corpus
from tools.train_pair.recipe import PairRecipe
from tools.train_pair.train import PairTraining, Phase

HERE = Path(__file__).parent
PHASES: tuple[Phase, ...] = ("trunk", "rope", "drope")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m tools.train_pair", description=__doc__)
    p.add_argument("--corpus", type=Path, required=True, help="folder of .txt books")
    p.add_argument(
        "--out", type=Path, default=Path("build/pair"), help="checkpoints, logs, the finished pair"
    )
    p.add_argument("--cache", type=Path, help="tokenizer and token streams (default: OUT/cache)")
    p.add_argument("--recipe", type=Path, default=HERE / "recipes" / "pair.json", help="the numbers, as JSON")
    p.add_argument(
        "--held-out", nargs="+", default=list(corpus.HELD_OUT), help="books (without .txt) never trained on"
    )
    p.add_argument("--phase", choices=("prepare", *PHASES, "export", "all"), default="all")
    p.add_argument("--trunk-tokens", type=int, help="branch after this many tokens instead of the recipe's")
    p.add_argument(
        "--twin-tokens", type=int, help="tokens for each twin after the branch instead of the recipe's"
    )
    p.add_argument("--decay-tokens", type=int, help="the last of them, over which the learning rate falls")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--device", default="cpu")
    return p


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    changes = {
        name: value
        for name in ("trunk_tokens", "twin_tokens", "decay_tokens")
        if (value := getattr(args, name)) is not None
    }
    recipe = PairRecipe.read(args.recipe).replace(**changes)
    cache = args.cache or args.out / "cache"
    corpus.prepare(args.corpus, cache, tuple(args.held_out), recipe.vocab_size)
    for phase in PHASES:
        if args.phase in (phase, "all"):
            trunk = None if phase == "trunk" else args.out / "trunk"
            PairTraining(recipe, phase, args.out / phase, cache, trunk, args.device).run()
    if args.phase in ("export", "all"):
        from tools.train_pair.export import export

        export(recipe, args.out, cache, args.out / "export")


if __name__ == "__main__":
    main()
