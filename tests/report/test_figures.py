"""What the figures draw is what the tables hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import phaselens
from phaselens.errors import InputError
from phaselens.report.figures import COLOURS, draw, figures
from phaselens.runs import Run
from tests.toys import letters, toy_lens


@pytest.fixture(scope="module")
def run() -> Run:
    lenses = [toy_lens("llama", label="one"), toy_lens("llama-drope-nope", label="two & <b>", seed=1)]
    texts = [letters(9), letters(14, 5), letters(20, 2)]
    return phaselens.run(lenses, metrics=["sinks", "bos-norm", "compression", "bos-write"], texts=texts)


@pytest.fixture(scope="module")
def drawn(run: Run) -> dict[str, Any]:
    return dict(figures(run))


def test_one_figure_a_metric_one_by_head_and_the_set(drawn: dict[str, Any]) -> None:
    curves = {"sinks", "bos-norm", "compression", "bos-write"}
    heads = {"sinks-heads", "bos-write-heads"}
    assert set(drawn) == curves | heads | {
        "study-sink-rate",
        "study-bos-norm",
        "study-entropy",
        "study-summary",
    }
    assert len(drawn["study-summary"].axes) == 4


def test_curves_are_the_tables_numbers(run: Run, drawn: dict[str, Any]) -> None:
    (axes,) = drawn["compression"].axes
    for place, label in enumerate(["one", "two & <b>"]):
        records = [r for r in run.rows("compression", "layers").records() if r["model"] == label]
        line, null = axes.lines[2 * place], axes.lines[2 * place + 1]
        assert line.get_label() == label
        assert line.get_color() == null.get_color() == COLOURS[place]
        assert list(line.get_ydata()) == [r["entropy"] for r in records]
        assert list(null.get_ydata()) == [r["null"] for r in records]
        band = axes.collections[place].get_paths()[0].vertices
        assert band[:, 1].min() == pytest.approx(min(r["ci_low"] for r in records))
        assert band[:, 1].max() == pytest.approx(max(r["ci_high"] for r in records))
    assert axes.get_ylabel() == "entropy (nats)"


def test_shares_are_drawn_in_percent(run: Run, drawn: dict[str, Any]) -> None:
    (axes,) = drawn["sinks"].axes
    rates = [r["sink_rate"] for r in run.rows("sinks", "layers").records() if r["model"] == "one"]
    assert list(axes.lines[0].get_ydata()) == pytest.approx([100 * rate for rate in rates])


def test_pictures_of_heads_are_the_tables_numbers(run: Run, drawn: dict[str, Any]) -> None:
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
    named = dict(figures(run))
    assert np.isnan(named["compression"].axes[0].lines[0].get_ydata()).all()
    assert np.isnan(np.asarray(named["sinks-heads"].axes[0].images[0].get_array().filled(np.nan))).all()


@pytest.mark.slow
def test_files(run: Run, tmp_path: Path) -> None:
    some = Run(run.models, run.texts, {"sinks": run.metrics["sinks"]}, [], run.options, run.versions)
    written = draw(some, tmp_path / "new" / "folder")
    assert sorted(path.name for path in written) == sorted(
        f"{name}.{form}" for name in ("sinks", "sinks-heads", "study-sink-rate") for form in ("png", "svg")
    )
    for path in written:
        start = path.read_bytes()[:200]
        assert start.startswith(b"\x89PNG") if path.suffix == ".png" else b"<?xml" in start
    assert b"two &amp; &lt;b&gt;" in (tmp_path / "new" / "folder" / "sinks-heads.svg").read_bytes()


def test_a_folder_that_cannot_be_made_is_told_in_one_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="figures cannot be written to"):
        draw(run, tmp_path / "file" / "below")
