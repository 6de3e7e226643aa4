"""Draw the pair's training from the committed results: `python -m tools.train_pair.figures`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tools.train_pair.results import RESULTS, read_log

IMAGES = Path(__file__).parents[2] / "docs" / "images" / "pair"
ROPE, DROPE, TRUNK, NORM = "#1b6ca8", "#d1495b", "#555555", "#e0a030"
TableRows = Sequence[dict[str, Any]]


def millions(rows: TableRows) -> list[float]:
    return [row["tokens"] / 1e6 for row in rows]


def uniform_sink(length: int) -> float:
    """Return sink score of uniform causal attention, query 0 excluded: mean of 1/(i+1) over i = 1 .. length-1."""
    return float(np.mean([1 / (i + 1) for i in range(1, length)]))


def layer_colors(n_layers: int) -> list[Any]:
    return [plt.get_cmap("viridis")(0.92 * i / max(1, n_layers - 1)) for i in range(n_layers)]


def _branch(axes: Axes, trunk: TableRows) -> None:
    axes.axvline(trunk[-1]["tokens"] / 1e6, color="black", linewidth=0.8, linestyle=":")


def _panels(
    trunk: TableRows, rope: TableRows, drope: TableRows
) -> tuple[Figure, list[tuple[Axes, TableRows]]]:
    """Make three panels side by side: the trunk, and each twin from the branch on."""
    figure, axes = plt.subplots(
        1, 3, figsize=(12, 4.2), sharey=True, layout="constrained", width_ratios=(1.5, 1, 1)
    )
    titles = ("trunk", "rope, from the branch on", "drope: rotation nulled at the branch")
    for panel, title in zip(axes, titles, strict=True):
        panel.set(title=title, xlabel="tokens trained, millions")
    return figure, list(zip(axes, (trunk, rope, drope), strict=True))


def sinks(trunk: TableRows, rope: TableRows, drope: TableRows) -> Figure:
    """Draw every head past layer 0: the trunk, and each twin."""
    figure, panels = _panels(trunk, rope, drope)
    n_layers = len(trunk[0]["sink"])
    colors = layer_colors(n_layers)
    for axes, rows in panels:
        for layer in range(1, n_layers):
            for head in range(len(rows[0]["sink"][layer])):
                axes.plot(
                    millions(rows), [r["sink"][layer][head] for r in rows], color=colors[layer], linewidth=1.2
                )
        axes.axhline(0.3, color="black", linewidth=0.8, linestyle="--")
        axes.axhline(uniform_sink(256), color="grey", linewidth=0.8)
        axes.set(ylim=(0, 0.8))
    left_axes = panels[0][0]
    left_axes.set_ylabel("attention to <s>, mean of a head")
    handles = [plt.Line2D([], [], color=colors[i], label=f"layer {i}") for i in range(1, n_layers)]
    handles += [
        plt.Line2D([], [], color="black", linestyle="--", linewidth=0.8, label="threshold 0.3"),
        plt.Line2D([], [], color="grey", linewidth=0.8, label="uniform attention"),
    ]
    left_axes.legend(handles=handles, fontsize=8, loc="upper left")
    return figure


def norms(trunk: TableRows, rope: TableRows, drope: TableRows) -> Figure:
    """Draw the BOS norm ratio after each layer."""
    figure, panels = _panels(trunk, rope, drope)
    n_layers = len(trunk[0]["bos_ratio"])
    colors = layer_colors(n_layers)
    for axes, rows in panels:
        for layer in range(n_layers):
            label = f"after layer {layer}"
            axes.plot(millions(rows), [r["bos_ratio"][layer] for r in rows], color=colors[layer], label=label)
    top = max(ratio for _, rows in panels for row in rows for ratio in row["bos_ratio"])
    panels[0][0].set(ylim=(0, 1.05 * top), ylabel="norm of <s> over median of the others")
    panels[0][0].legend(fontsize=8, loc="upper left")
    return figure


def entropies(trunk: TableRows, rope: TableRows, drope: TableRows) -> Figure:
    """Draw the matrix entropy after each layer."""
    figure, panels = _panels(trunk, rope, drope)
    n_layers = len(trunk[0]["entropy"])
    colors = layer_colors(n_layers)
    for axes, rows in panels:
        for layer in range(n_layers):
            label = f"after layer {layer}"
            axes.plot(millions(rows), [r["entropy"][layer] for r in rows], color=colors[layer], label=label)
    # In the first million tokens the entropy falls to 0.5 nats; that range would flatten the curves after it.
    later = [value for rows in (rope, drope) for row in rows for value in row["entropy"]]
    panels[0][0].set_ylim(min(later) - 0.1, max(later) + 0.1)
    panels[0][0].set_ylabel("matrix entropy, nats")
    panels[0][0].legend(fontsize=8, loc="lower right")
    return figure


def loss(trunk: TableRows, rope: TableRows, drope: TableRows) -> Figure:
    """Draw the held-out loss: the whole run, and the twins from the branch on."""
    figure, (complete_axes, branch_axes) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axes in (complete_axes, branch_axes):
        axes.plot(
            millions(rope), [r["loss"] for r in rope], color=ROPE, label="rope", marker=".", markersize=3
        )
        axes.plot(
            millions(drope), [r["loss"] for r in drope], color=DROPE, label="drope", marker=".", markersize=3
        )
        axes.set_xlabel("tokens trained, millions")
    complete_axes.plot(millions(trunk), [r["loss"] for r in trunk], color=TRUNK, label="trunk")
    _branch(complete_axes, trunk)
    complete_axes.set(
        ylabel="held-out loss, nats per token", title="whole run", ylim=(None, trunk[0]["loss"])
    )
    complete_axes.legend()
    branch_axes.set(title="from the branch on")
    branch_axes.plot(
        [trunk[-1]["tokens"] / 1e6], [trunk[-1]["loss"]], "o", color=TRUNK, label="trunk at the branch"
    )
    branch_axes.legend()
    return figure


def depth(trunk: TableRows, rope: TableRows, drope: TableRows) -> Figure:
    """Draw profiles over depth at the branch and at the end: entropy, BOS ratio, mean and strongest sink."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.8), layout="constrained")
    states = (
        (trunk[-1], "trunk at the branch", TRUNK, "-"),
        (drope[0], "rotation nulled, no training", DROPE, ":"),
        (rope[-1], "rope, end", ROPE, "-"),
        (drope[-1], "drope, end", DROPE, "-"),
    )
    for row, label, color, line in states:
        layers = range(len(row["entropy"]))
        axes[0].plot(
            layers, row["entropy"], color=color, linestyle=line, marker="o", markersize=3, label=label
        )
        axes[1].plot(layers, row["bos_ratio"], color=color, linestyle=line, marker="o", markersize=3)
        axes[2].plot(
            layers, [max(r) for r in row["sink"]], color=color, linestyle=line, marker="o", markersize=3
        )
    axes[0].set(title="matrix entropy after the layer, nats", xlabel="layer")
    axes[1].set(title="norm of <s> over median of the others", xlabel="layer", ylim=(0, None))
    axes[2].set(title="strongest sink head of the layer", xlabel="layer", ylim=(0, 1))
    axes[2].legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="upper left")
    return figure


def draw_runs(runs: dict[str, TableRows], count: int = 5) -> Figure:
    """Draw the strongest heads and the largest norm ratio of each run by tokens seen."""
    columns = 3
    height = -(-len(runs) // columns)
    figure, grid = plt.subplots(
        height,
        columns,
        figsize=(12, 3.3 * height),
        sharex=True,
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    top = 1.1 * max(max(r["bos_ratio"]) for rows in runs.values() for r in rows)
    for axes in grid.flat[len(runs) :]:
        axes.axis("off")
    for axes, (name, rows) in zip(grid.flat, runs.items(), strict=False):
        ranked = [sorted((v for layer in r["sink"][1:] for v in layer), reverse=True)[:count] for r in rows]
        for index in range(count):
            shade = 1 - index / (count + 1)
            axes.plot(millions(rows), [r[index] for r in ranked], color=ROPE, alpha=shade)
        ratio = axes.twinx()
        ratio.plot(millions(rows), [max(r["bos_ratio"]) for r in rows], color=NORM)
        ratio.set(ylim=(0, top))
        axes.set(title=name, ylim=(0, 0.6))
        axes.xaxis.set_tick_params(labelbottom=True)
    figure.supxlabel("tokens trained, millions")
    figure.supylabel(f"sink score, {count} strongest heads past layer 0 (blue)")
    figure.text(1.0, 0.5, "largest norm ratio of <s> (yellow)", rotation=270, va="center", ha="left")
    return figure


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m tools.train_pair.figures", description=__doc__)
    p.add_argument("--results", type=Path, default=RESULTS)
    p.add_argument("--out", type=Path, default=IMAGES)
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    trunk, rope, drope = (read_log(args.results / f"{name}.jsonl") for name in ("trunk", "rope", "drope"))
    for draw in (sinks, norms, entropies, loss, depth):
        draw(trunk, rope, drope).savefig(args.out / f"{draw.__name__}.png", dpi=110)
    runs = {"shipped, trunk and rope": [*trunk, *rope]}
    for path in sorted(args.results.glob("tried-*.jsonl")):
        runs[path.stem.removeprefix("tried-").replace("-", " ")] = read_log(path)
    draw_runs(runs).savefig(args.out / "tried.png", dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
