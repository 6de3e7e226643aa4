"""Figures draw the numbers of the tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

import phaselens
from phaselens.errors import InputError
from phaselens.plugin import Column, Display, FigurePanel, FigureSet, Metric, TableSpec
from phaselens.report.figures import COLOURS, draw, figures
from phaselens.runs import Run
from tests.runs.metrics import probe
from tests.toys import letters, toy_lens


@pytest.fixture(scope="module")
def run() -> Run:
    lenses = [toy_lens("llama", label="one"), toy_lens("llama-drope-nope", label="two & <b>", seed=1)]
    texts = [letters(9), letters(14, 5), letters(20, 2)]
    return phaselens.run(lenses, metrics=["sinks", "bos-norm", "compression", "bos-write"], texts=texts)


@pytest.fixture(scope="module")
def drawn(run: Run) -> dict[str, Figure]:
    return dict(figures(run))


@pytest.mark.slow
def test_each_metric_has_a_figure_some_have_heads_and_there_is_a_set(drawn: dict[str, Figure]) -> None:
    curves = {"sinks", "bos-norm", "compression", "bos-write"}
    heads = {"sinks-heads", "bos-write-heads"}
    assert set(drawn) == curves | heads | {
        "study-bos-norm",
        "study-summary",
    }
    assert len(drawn["study-summary"].axes) == 4


def test_no_two_figures_show_the_same_curves_and_titles_name_models_and_texts(
    drawn: dict[str, Figure],
) -> None:
    curves = {}
    for name, figure in drawn.items():
        assert "one, two & <b>; 3 texts" in figure.get_suptitle(), name
        if name != "study-summary":
            lines = [tuple(line.get_ydata()) for axes in figure.axes for line in axes.lines]
            images = [image.get_array().tobytes() for axes in figure.axes for image in axes.images]
            curves[name] = repr((lines, images))
    assert len(set(curves.values())) == len(curves)
    assert drawn["sinks"].get_suptitle().splitlines()[0] == "attention sinks: sink rate"


def test_a_title_that_a_metric_draws_is_kept_above_models_and_texts() -> None:
    metric = probe(plots=True, plot=classmethod(lambda cls, tables, figure: figure.suptitle("of its own")))
    run = phaselens.run(toy_lens(label="$x$"), metrics=metric, texts=[letters(5)])
    (figure,) = dict(figures(run)).values()
    assert figure.get_suptitle() == "of its own\n\\$x\\$; 1 text"


def test_a_plugin_adds_a_figure_set_of_its_own() -> None:
    """Two metrics make up the set; its page is drawn only for a run with both."""
    norms = FigureSet("norms", ("first", "second", "third"))
    value = Display("value", "value")

    def metric(name: str, *panels: str) -> type[Metric[Any]]:
        return probe(
            name=name,
            tables=(TableSpec("layers", (Column("layer", int), Column("value"))),),
            compute=lambda self: {"layers": self.table("layers", [(0, 1.0), (1, 2.0)])},
            figure_panels=tuple(FigurePanel(norms, panel, value) for panel in panels),
        )

    metrics = [metric("one", "third"), metric("other", "second", "first")]
    drawn = dict(figures(phaselens.run(toy_lens(), metrics=metrics, texts=[letters(5)])))
    assert list(drawn) == ["norms-first", "norms-second", "norms-third", "norms-summary"]
    titles = [axes.get_title(loc="left") for axes in drawn["norms-summary"].axes]
    assert titles == ["a  other: value", "b  other: value", "c  one: value", ""]
    assert list(drawn["norms-third"].axes[0].lines[0].get_ydata()) == [1.0, 2.0]
    assert list(dict(figures(phaselens.run(toy_lens(), metrics=metrics[:1], texts=[letters(5)])))) == [
        "norms-third"
    ]


def test_curves_are_the_tables_numbers(run: Run, drawn: dict[str, Figure]) -> None:
    (axes,) = drawn["compression"].axes
    for model, label in enumerate(["one", "two & <b>"]):
        records = [r for r in run.rows("compression", "layers").records() if r["model"] == label]
        line, null = axes.lines[2 * model], axes.lines[2 * model + 1]
        assert line.get_label() == label
        assert line.get_color() == null.get_color() == COLOURS[model]
        assert list(line.get_ydata()) == [r["entropy"] for r in records]
        assert list(null.get_ydata()) == [r["null"] for r in records]
        band = axes.collections[model].get_paths()[0].vertices
        assert band[:, 1].min() == pytest.approx(min(r["ci_low"] for r in records))
        assert band[:, 1].max() == pytest.approx(max(r["ci_high"] for r in records))
    assert axes.get_ylabel() == "entropy (nats)"


def test_shares_are_drawn_in_percent(run: Run, drawn: dict[str, Figure]) -> None:
    (axes,) = drawn["sinks"].axes
    rates = [r["sink_rate"] for r in run.rows("sinks", "layers").records() if r["model"] == "one"]
    assert list(axes.lines[0].get_ydata()) == pytest.approx([100 * rate for rate in rates])


def test_heatmaps_of_heads_are_the_tables_numbers(run: Run, drawn: dict[str, Figure]) -> None:
    panels = [axes for axes in drawn["sinks-heads"].axes if axes.images]
    assert len(panels) == 2
    for panel, label in zip(panels, ["one", "two & <b>"], strict=True):
        grid = np.asarray(panel.images[0].get_array())
        for row in run.rows("sinks", "heads").records():
            if row["model"] == label:
                assert grid[row["layer"], row["head"]] == row["score"]
    limits = {panel.images[0].get_clim() for panel in panels}
    assert limits == {(0.0, 1.0)}, "one scale for all models"


def test_missing_values_are_gaps() -> None:
    run = phaselens.run(toy_lens("llama"), metrics=["compression", "sinks"], texts=[""])
    figures_by_name = dict(figures(run))
    assert np.isnan(figures_by_name["compression"].axes[0].lines[0].get_ydata()).all()
    assert np.isnan(
        np.asarray(figures_by_name["sinks-heads"].axes[0].images[0].get_array().filled(np.nan))
    ).all()


@pytest.mark.slow
def test_every_figure_is_a_png_and_an_svg_file(run: Run, tmp_path: Path) -> None:
    sinks_run = Run(run.models, run.texts, {"sinks": run.metrics["sinks"]}, [], run.options, run.versions)
    paths = draw(sinks_run, tmp_path / "new" / "folder")
    assert sorted(path.name for path in paths) == sorted(
        f"{name}.{extension}" for name in ("sinks", "sinks-heads") for extension in ("png", "svg")
    )
    for path in paths:
        start = path.read_bytes()[:200]
        assert start.startswith(b"\x89PNG") if path.suffix == ".png" else b"<?xml" in start
    assert b"two &amp; &lt;b&gt;" in (tmp_path / "new" / "folder" / "sinks-heads.svg").read_bytes()


def test_an_impossible_folder_is_an_error_of_one_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="figures cannot be written to"):
        draw(run, tmp_path / "file" / "below")
