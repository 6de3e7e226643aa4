"""Figures of conditions draw the numbers of the tables, with names as they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from phaselens.report.drawing import COLOURS, MARKERS, lettering, new_figure, signed_scale
from phaselens.report.figures import draw, figures
from phaselens.runs import Run
from tests.report.causal_runs import baseline, causal_run, condition, contrast, shares, sweep, two_models


def drawn(run: Run) -> dict[str, Figure]:
    figures_by_name = dict(figures(run))
    assert not run.failed
    for figure in figures_by_name.values():
        figure.draw_without_rendering()
    return figures_by_name


def dots(axes: Axes) -> list[Line2D]:
    """Return the markers of the effects: lines of one point."""
    return [line for line in axes.lines if len(line.get_xdata()) == 1 and line.get_marker() in MARKERS]


def test_effects_are_the_tables_numbers_with_controls_beneath_their_conditions() -> None:
    (figure,) = drawn(two_models()).values()
    (axes,) = figure.axes
    names = [tick.get_text() for tick in axes.get_yticklabels()]
    assert names == ["write layer", "└ other position", "below the last", "other position: below the last"]
    rope, drope = ([dot for dot in dots(axes) if dot.get_color() == colour] for colour in COLOURS[:2])
    assert [float(dot.get_xdata()[0]) for dot in rope] == [0.1387, 0.0003]
    assert [float(dot.get_xdata()[0]) for dot in drope][:3] == [7.504, 0.0, 13.8]
    assert np.isnan(drope[3].get_xdata()[0]), "a missing value is not drawn"
    assert [round(float(dot.get_ydata()[0])) for dot in drope] == [0, 1, 2, 3], "each in its row"
    assert {dot.get_marker() for dot in rope}.isdisjoint({dot.get_marker() for dot in drope})
    assert [dot.get_markerfacecolor() == "white" for dot in drope] == [False, True, False, False]
    bars = [
        line.get_xdata()
        for line in axes.lines
        if len(line.get_xdata()) == 2 and line.get_color() == COLOURS[0]
    ]
    assert [list(map(float, bar)) for bar in bars] == [[0.1058, 0.1728], [-0.0005, 0.0011]]
    assert [text.get_text() for text in axes.texts] == ["L1", "L1", "L5", "L5", "L0", "L0"]


def test_a_line_marks_zero_and_the_legend_names_every_marker() -> None:
    (figure,) = drawn(two_models()).values()
    (axes,) = figure.axes
    assert any(list(line.get_xdata()) == [0, 0] for line in axes.lines)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["rope", "drope", "control"]
    assert legend.get_title().get_text() == "bars: 95 % intervals; linear to ±0.01, then logarithmic"


def test_a_control_is_moved_beneath_its_condition() -> None:
    rows = [baseline(), *(condition(name, None, 1.1, delta=(0.1, 0.0, 0.2)) for name in ("c", "a", "b"))]
    contrasts = [contrast("a", "c", None, 0.0, -0.1, 0.1, 0.5)]
    (figure,) = drawn(causal_run({"one": {"conditions": rows, "contrasts": contrasts}})).values()
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["a", "└ c", "b"]


def test_a_sweep_is_one_curve_per_model_with_its_control_dashed() -> None:
    run = sweep({"one": 3, "two": 5})
    figures_by_name = drawn(run)
    assert list(figures_by_name) == ["effects-by-layer"], "no condition remains for a forest"
    (axes,) = [panel for panel in figures_by_name["effects-by-layer"].axes if panel.get_visible()]
    for colour, label, n in zip(COLOURS, ("one", "two"), (3, 5), strict=False):
        records = [
            record for record in run.rows("effects", "conditions").records() if record["model"] == label
        ]
        curve, control = (line for line in axes.lines if line.get_color() == colour)
        for line, name in ((curve, "MLP off"), (control, "MLP off elsewhere")):
            condition_records = [record for record in records if record["condition"] == name]
            assert list(line.get_xdata()) == [*range(n)]
            assert list(line.get_ydata()) == [record["delta_nats"] for record in condition_records]
        assert (curve.get_label(), curve.get_linestyle(), control.get_linestyle()) == (label, "-", "--")
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (pytest.approx(0.001), pytest.approx(0.302))


def test_sweeps_and_single_conditions_have_separate_figures() -> None:
    run = sweep({"one": 3})
    run.metrics["effects"].tables["conditions"].rows.append(
        ("one", *condition("all layers", None, 2.0, delta=(0.69, 0.6, 0.8)), 0.5, 0.5)
    )
    assert list(drawn(run)) == ["effects", "effects-by-layer"]
    (axes,) = drawn(run)["effects"].axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["all layers"]


def test_shares_are_drawn_in_percent_with_their_null() -> None:
    (figure,) = drawn(shares()).values()
    (axes,) = figure.axes
    assert float(dots(axes)[0].get_xdata()[0]) == 75.0
    nulls = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "|" and len(line.get_xdata())]
    assert nulls == [1.0, 1.0]
    assert axes.get_xlabel() == "right (%)"
    assert axes.get_xscale() == "linear"


def test_one_text_has_points_and_no_bars() -> None:
    rows = [baseline(n_texts=1), condition("a", 1, 1.25, delta=(0.22, None, None))]
    (figure,) = drawn(causal_run({"one": {"conditions": rows, "contrasts": []}, "two": {}})).values()
    assert [float(dot.get_xdata()[0]) for dot in dots(figure.axes[0])] == [0.22]


def test_a_baseline_alone_has_no_figure() -> None:
    assert drawn(causal_run({"one": {"conditions": [baseline()], "contrasts": []}})) == {}


@pytest.mark.filterwarnings("ignore:Glyph")
def test_names_are_not_read_as_formulas_or_markup(tmp_path: Path) -> None:
    name = r"$\frac{x$ <b>&\n" + "\x1b[2J"
    rows = [baseline(), condition(name, 1, 1.25, delta=(0.22, 0.1, 0.3))]
    run = causal_run({name: {"conditions": rows, "contrasts": []}})
    draw(run, tmp_path)
    assert not run.failed
    picture = (tmp_path / "effects.svg").read_text()
    assert "$\\frac{x$ &lt;b&gt;&amp;\\n\\x1b[2J" in picture
    assert (tmp_path / "effects.png").read_bytes().startswith(b"\x89PNG")
    assert lettering("$", 5) == r"\$"


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([0.01, -0.02, 0.03], "linear"),
        ([0.001, 0.002, 0.15], "linear"),
        ([1.0, 2.0, 3.0], "linear"),
        ([0.001, -0.002, 0.25], "symlog"),
        ([float("nan"), 0.0], "linear"),
        ([], "linear"),
    ],
)
def test_an_axis_is_logarithmic_only_where_small_values_need_it(values: list[float], scale: str) -> None:
    _, ((axes,),) = new_figure(3, 3)
    axes.plot(values, values)
    note = signed_scale(axes, "y", values)
    assert axes.get_yscale() == scale
    assert bool(note) == (scale == "symlog")
    if note:
        assert axes.get_ylim()[0] > -0.01, "limits follow the new scale"


def test_of_many_effects_the_largest_are_drawn_and_the_legend_says_so() -> None:
    rows = [condition(f"c{index}", None, 1.0, delta=(index / 100, 0.0, 1.0)) for index in range(60)]
    (figure,) = drawn(causal_run({"one": {"conditions": [baseline(), *rows], "contrasts": []}})).values()
    names = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert names == [f"c{index}" for index in range(20, 60)]
    assert "the 40 largest of 60 effects" in figure.legends[0].get_title().get_text()
    assert figure.get_size_inches()[1] < 11
