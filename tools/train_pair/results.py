"""Gather the logs of a finished pair into the small files that figures and tables are made from.

`python -m tools.train_pair.results --pair DIR --tried NAME=DIR … --out tools/train_pair/results`
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from tools.train_pair.train import LOG

RESULTS = Path(__file__).with_name("results")
COLUMNS = (
    "phase",
    "step",
    "tokens",
    "seconds",
    "lr",
    "train_loss",
    "loss",
    "sink",
    "bos_ratio",
    "bos_norm",
    "entropy",
)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a log or of a results file, in the order of their steps."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def gather(log: Path, out: Path) -> None:
    """Copy a log's curves, to four decimals (the learning rate exactly)."""
    rows = (
        {key: row[key] if key == "lr" else _rounded(row[key]) for key in COLUMNS} for row in read_log(log)
    )
    out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m tools.train_pair.results", description=__doc__)
    p.add_argument("--pair", type=Path, required=True, help="the --out folder of the finished pair")
    p.add_argument(
        "--tried", nargs="*", default=[], metavar="NAME=DIR", help="other runs whose trunks to keep"
    )
    p.add_argument("--out", type=Path, default=RESULTS)
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for phase in ("trunk", "rope", "drope"):
        gather(args.pair / phase / LOG, args.out / f"{phase}.jsonl")
    for name_and_folder in args.tried:
        name, _, folder = name_and_folder.partition("=")
        gather(Path(folder) / "trunk" / LOG, args.out / f"tried-{name}.jsonl")
        shutil.copyfile(Path(folder) / "trunk" / "recipe.json", args.out / f"tried-{name}-recipe.json")
    shutil.copyfile(args.pair / "export" / "pair.json", args.out / "pair.json")


if __name__ == "__main__":
    main()
