"""Draw the figures of docs/real-model.md: `python -m tools.recalibrate.figures [--runs DIR …]`.

The curves of the training come from the committed results, what the models show by layer from stored runs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from tools.recalibrate.findings import StoredRuns
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

#: What is drawn by layer: metric, column with its interval, title, and whether the scale is logarithmic.
BY_LAYER = (
    ("sinks", ("sink_rate", "ci_low", "ci_high"), "share of heads that are sinks", False),
    ("bos-norm", ("bos_norm", "ci_low", "ci_high"), "norm of BOS after the layer", True),
    ("compression", ("entropy", "ci_low", "ci_high"), "matrix entropy after the layer, nats", False),
)
#: Color and line of each model.
LINES = {
    "smollm2-rope": (ROPE, "-"),
    "smollm2-drope": (DROPE, "-"),
    "smollm2": (ROPE, ":"),
    "nulled": (DROPE, ":"),
}


def by_layer(runs: StoredRuns) -> Figure:
    """Draw sinks, norm and entropy of all models by layer, with intervals over texts."""
    figure, row = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for axes, (metric, columns, title, is_logarithmic) in zip(row, BY_LAYER, strict=True):
        models = runs.by_model(metric, "layers")
        for model in sorted(models, key=[*LINES, *models].index):
            color, line = LINES.get(model, ("0.4", "-"))
            layers = [cells["layer"] for cells in models[model]]
            values, low, high = ([cells[column] for cells in models[model]] for column in columns)
            axes.plot(layers, values, color=color, linestyle=line, label=model)
            if line == "-":
                axes.fill_between(layers, low, high, color=color, alpha=0.2, linewidth=0)
        axes.set(title=title, xlabel="layer")
        if is_logarithmic:
            axes.set_yscale("log")
    row[0].legend(fontsize="small")
    return figure


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
    p.add_argument("--runs", type=Path, nargs="*", default=[], help="stored runs, for the figure by layer")
    p.add_argument("--out", type=Path, default=IMAGES)
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    twins = {f"smollm2-{twin}": read_log(args.results / f"{twin}.jsonl") for twin in ("rope", "drope")}
    training(twins).savefig(args.out / "training.png", dpi=110)
    if args.runs:
        by_layer(StoredRuns(args.runs)).savefig(args.out / "layers.png", dpi=110)


if __name__ == "__main__":
    main()
