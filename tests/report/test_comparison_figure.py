"""The figure of a comparison: a panel per metric, and points that are filled where the interval excludes 0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import phaselens
from phaselens.errors import InputError
from phaselens.report.comparison_figure import comparison_figure, draw_comparison, require_suffix
from tests.toys import letters, toy_lens

TEXTS = [letters(6 + 2 * index, index) for index in range(6)]


@pytest.fixture(scope="module")
def comparison() -> Any:
    lenses = [toy_lens(seed=seed, label=label) for seed, label in ((0, "a"), (1, "b $x$"))]
    run = phaselens.run(lenses, metrics=["sinks", "bos-mlp", "massive-values"], texts=TEXTS)
    return phaselens.compare(run)


@pytest.mark.slow
def test_the_figure_has_a_panel_for_each_metric(comparison: Any) -> None:
    figure = comparison_figure(comparison)
    titles = [axes.get_title() for axes in figure.axes if axes.axison]
    assert titles == [
        "sinks: score, share of attention",
        "bos-mlp: loss over the baseline, nats/token",
        "massive-values: count_global, cells",
    ]
    assert f"{comparison.n_differences} differences in all" in figure.get_suptitle()
    assert "paired by text; 6 texts" in figure.get_suptitle()


def test_points_are_filled_where_the_interval_excludes_zero(comparison: Any) -> None:
    (panel, *_) = comparison_figure(comparison).axes
    records = [
        r for r in comparison.differences.records() if r["metric"] == "sinks" and r["value"] == "score"
    ]
    (points,) = [collection for collection in panel.collections if len(collection.get_offsets()) > 0][-1:]
    white = (1.0, 1.0, 1.0, 1.0)
    filled = [tuple(colour) != white for colour in points.get_facecolors()]  # type: ignore[attr-defined]
    assert filled == [bool(record["excludes_zero"]) for record in records]


def test_the_file_has_the_format_of_its_suffix(comparison: Any, tmp_path: Path) -> None:
    draw_comparison(comparison, tmp_path / "new" / "c.svg")
    assert (tmp_path / "new" / "c.svg").read_text().startswith("<?xml")
    assert require_suffix("c.PDF") == "pdf"
    with pytest.raises(InputError, match=r"figure 'c\.gif': the file's name must end with \.png, \.svg"):
        require_suffix("c.gif")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written: "):
        draw_comparison(comparison, tmp_path / "file" / "c.png")
