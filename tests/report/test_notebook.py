"""Runs and tables as HTML in notebooks, and single figures."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

import phaselens
from phaselens.errors import InputError
from phaselens.report.notebook import plot, run_html
from phaselens.runs import Run
from tests.report.runs import made_run
from tests.runs.metrics import probe
from tests.toys import letters, toy_lens

MARKUP = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def run() -> Run:
    lens = toy_lens(label=MARKUP)
    return phaselens.run(lens, metrics=["sinks", "bos-norm", probe()], texts=[letters(9), letters(14, 5)])


def test_a_run_is_small_html_without_scripts(run: Run) -> None:
    html = run._repr_html_()
    assert html == run_html(run)
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert "sink rate" in html
    assert len(html) < 30_000


def test_a_run_without_a_presenter_has_its_text_only() -> None:
    assert made_run()._repr_html_() is None
    with pytest.raises(InputError, match=r"phaselens\.open_run"):
        made_run().plot("sinks")


def test_a_table_shows_its_first_rows_with_units(run: Run) -> None:
    table = run.rows("sinks", "texts")
    html = table._repr_html_()
    assert html.count("<tr>") == 1 + min(20, len(table.rows))
    assert "share of attention" in html
    assert "<script" not in html


def test_a_metrics_result_is_read_by_name_and_shown_as_its_tables(run: Run) -> None:
    sinks = run["sinks"]
    assert sinks["layers"] is run.rows("sinks", "layers")
    assert ("sinks" in run, "sink" in run, list(run)) == (True, False, ["sinks", "bos-norm", "probe"])
    assert "layers" in sinks
    assert list(sinks) == list(sinks.tables)
    assert repr(sinks).startswith("<sinks: texts of ")
    html = sinks._repr_html_()
    assert html.index("sink_rate") < html.index("<details>")
    assert "<script" not in html
    with pytest.raises(InputError, match="did you mean sinks"):
        run["sink"]
    with pytest.raises(InputError, match="did you mean layers"):
        sinks["layer"]


def test_a_comparison_is_html_without_scripts() -> None:
    lenses = [toy_lens(label=MARKUP), toy_lens(label="b")]
    comparison = phaselens.compare(
        phaselens.run(lenses, metrics=["bos-norm"], texts=[letters(9), letters(7)])
    )
    html = comparison._repr_html_()
    assert "&lt;script&gt;" in html
    assert "<script" not in html
    comparison.html_renderer = None
    assert "first_model" in comparison._repr_html_()


def test_figures_are_chosen_by_name_and_shown_as_pictures(run: Run) -> None:
    figure = run.plot("sinks", "heads")
    assert isinstance(figure, Figure)
    assert len(figure.axes) == 2
    assert run.plot("sinks").axes[0].get_xlabel() == "layer"
    assert vars(figure)["_repr_png_"]().startswith(b"\x89PNG")


def test_a_figure_that_does_not_exist_is_refused(run: Run) -> None:
    with pytest.raises(InputError, match="did you mean heads"):
        run.plot("sinks", "head")
    with pytest.raises(InputError, match="did you mean sinks"):
        run.plot("sink")
    with pytest.raises(InputError, match="has no figure"):
        run.plot("probe")


def test_a_failed_drawing_fails_the_call_only() -> None:
    metric = probe(plots=True, plot=classmethod(lambda cls, tables, figure: 1 / 0))
    run = phaselens.run(toy_lens(), metrics=metric, texts=[letters(5)])
    with pytest.raises(InputError, match="ZeroDivisionError"):
        plot(run, "probe")
    assert run.failed == []
