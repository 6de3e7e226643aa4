"""The figure of `rope-frequencies`: use and score by period, and the bands of massive cells, model by model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from phaselens.plugin import Table
from phaselens_plugins._drawing import (
    INK,
    Record,
    bare,
    draw_line,
    escaped,
    numbers,
    records_by_model,
    styles,
)
from phaselens_plugins._frequency_tables import BANDS, HIGH_PERIOD

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BY_PERIOD = (("use", "share of ‖q‖‖k‖"), ("score", "share of |q·k|"))


def draw_frequencies(tables: Mapping[str, Table], figure: Figure) -> None:
    """Draw each pair's use and score against its period, and the massive cells of q and k by band; means over layers.

    Solid lines are q in the last panel, dotted ones k. Vertical lines are the limits of the bands.
    """
    figure.set_size_inches(12.0, 3.9)
    panels = figure.subplots(1, 3, squeeze=False)[0]
    pairs, massive = records_by_model(tables["pairs"]), records_by_model(tables["massive"])
    trained = {label: rows[0]["n_ctx_trained"] for label, rows in records_by_model(tables["summary"]).items()}
    labels = list(trained)
    for label, style in styles(labels).items():
        by_period = _means_by(pairs.get(label, []), "period", ("use", "score", "null"))
        name = f"{label}, unrotated" if _is_unrotated(pairs.get(label, [])) else label
        for axes, (column, _) in zip(panels, _BY_PERIOD, strict=False):
            draw_line(axes, numbers(by_period, "period"), by_period, column, style, label=name, null="null")
            if isinstance(n_trained := trained[label], int):
                axes.axvline(n_trained, color=style["color"], linewidth=1.0, linestyle=":")
        for tensor, line in (("q", "-"), ("k", ":")):
            rows = [row for row in massive.get(label, []) if row["tensor"] == tensor]
            by_band = {row["band"]: row for row in _means_by(rows, "band", ("share", "share_null"))}
            ordered = [by_band[band] for band in BANDS if band in by_band]
            places = [float(BANDS.index(str(row["band"]))) for row in ordered]
            null = "share_null" if tensor == "q" else None
            draw_line(panels[2], places, ordered, "share", {**style, "linestyle": line}, null=null)
    for axes, (_, title) in zip(panels, _BY_PERIOD, strict=False):
        axes.axvline(HIGH_PERIOD, color=INK, linewidth=1.0, linestyle=":")
        axes.set_xscale("log", base=2)
        axes.set_title(f"{title} of each pair", loc="left", fontsize=9, color=INK)
        axes.set_xlabel("period (positions); high: under 8, low: over the trained length", fontsize=8)
        bare(axes)
    panels[2].set_xticks(range(len(BANDS)), BANDS)
    panels[2].set_xlim(-0.3, len(BANDS) - 0.7)
    panels[2].set_title("share of massive cells (solid: q, dotted: k)", loc="left", fontsize=9, color=INK)
    panels[2].set_xlabel("band of frequencies", fontsize=8)
    bare(panels[2])
    if panels[0].lines:
        panels[0].legend(
            frameon=False, fontsize=8, title=escaped("dashed: all pairs alike"), title_fontsize=8
        )


def _is_unrotated(records: Sequence[Record]) -> bool:
    return bool(records) and all(record["rotation"] == "unrotated" for record in records)


def _means_by(records: Sequence[Record], key: str, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Return the means of columns over the records of each value of `key`, ascending; records without one are left
    out, and a mean is over the records that have a value."""
    groups: dict[Any, list[Record]] = {}
    for record in records:
        if record[key] is not None:
            groups.setdefault(record[key], []).append(record)
    means = []
    for value in sorted(groups):
        row: dict[str, Any] = {key: value}
        for column in columns:
            present = [number for number in numbers(groups[value], column) if number == number]
            row[column] = sum(present) / len(present) if present else None
        means.append(row)
    return means
