"""Draw the twins' training from the committed results: `python -m tools.recalibrate.figures`."""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from tools.recalibrate.results import RESULTS
from tools.train_pair.figures import DROPE, ROPE, TableRows, millions
from tools.train_pair.results import read_log

IMAGES = Path(__file__).parents[2] / "docs" / "images" / "real"
PANELS = {
    "loss": "held-out loss, nats per token",
    "sink_rate": "share of heads that are sinks",
    "bos_norm": "largest norm of BOS",
    "entropy": "least matrix entropy, nats",
    "bos_mlp_ratio": "perplexity ratio without the MLP's write at BOS",
}


def training(twins: dict[str, TableRows]) -> Figure:
    """Draw the loss and the statistics of both twins by tokens trained."""
    figure, grid = plt.subplots(2, 3, figsize=(12, 6.4), layout="constrained")
    for axes, (name, title) in zip(grid.flat, PANELS.items(), strict=False):
        for (twin, rows), color in zip(twins.items(), (ROPE, DROPE), strict=True):
            measured = [row for row in rows if row.get(name) is not None]
            values = [row[name] for row in measured]
            axes.plot(millions(measured), values, color=color, label=twin, marker=".", markersize=4)
        axes.set(title=title, xlabel="tokens trained, millions")
    grid.flat[0].legend()
    grid.flat[-1].axis("off")
    return figure


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m tools.recalibrate.figures", description=__doc__)
    p.add_argument("--results", type=Path, default=RESULTS)
    p.add_argument("--out", type=Path, default=IMAGES)
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    twins = {f"smollm2-{twin}": read_log(args.results / f"{twin}.jsonl") for twin in ("rope", "drope")}
    training(twins).savefig(args.out / "training.png", dpi=110)


if __name__ == "__main__":
    main()
