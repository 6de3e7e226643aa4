"""Gather the logs of two finished twins into the small files that the figure is drawn from.

`python -m tools.recalibrate.results --drope RUN … --rope RUN …`: the runs of each twin in the order in which they
followed each other (`--start-from`, `--branch-from`).
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.recalibrate.recipe import RecalibrationRecipe
from tools.train_pair.results import read_log
from tools.train_pair.train import LOG

RESULTS = Path(__file__).with_name("results")
_DIGITS = 5


def gather(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the rows of all runs, each up to where the next one started or branched off."""
    rows: list[dict[str, Any]] = []
    for number, run in enumerate(runs):
        recipe = RecalibrationRecipe.read(run / "recipe.json")
        # A branch takes the steps of the run before it up to its cooldown.
        branch_start = recipe.cooldown_start * recipe.batch_tokens if number else 0
        start = recipe.start_tokens or branch_start
        rows = [row for row in rows if row["tokens"] <= start]
        # A run repeats the measurement at its start; the earlier run may have measured more there.
        rows += [row for row in read_log(run / LOG) if not rows or row["tokens"] > start]
    return [{key: _rounded(value) for key, value in row.items()} for row in rows]


def _rounded(value: Any) -> Any:
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m tools.recalibrate.results", description=__doc__)
    p.add_argument("--drope", type=Path, nargs="+", required=True)
    p.add_argument("--rope", type=Path, nargs="+", required=True)
    p.add_argument("--out", type=Path, default=RESULTS)
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for twin, runs in (("drope", args.drope), ("rope", args.rope)):
        lines = "".join(json.dumps(row) + "\n" for row in gather(runs))
        (args.out / f"{twin}.jsonl").write_text(lines, encoding="utf-8")
        for number, run in enumerate(runs, 1):
            shutil.copyfile(run / "recipe.json", args.out / f"{twin}-recipe-{number}.json")


if __name__ == "__main__":
    main()
