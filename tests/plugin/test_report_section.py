"""A section that a metric adds to a report: what it may hold, and how a run checks and keeps it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import phaselens
from phaselens.plugin import ReportSection
from phaselens.runs.report_sections import report_sections
from tests.runs.metrics import probe
from tests.toys import letters, toy_lens


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("",), "title"),
        (("a", "text"), "paragraphs"),
        (("a", (), ("x",), ((1, 2),)), "2 cells for 1 columns"),
        (("a", (), ("x",), ((float("nan"),),)), "finite"),
        (("a", (), ("x",), ((True,),)), "finite"),
        (("a", (), ("x",), 3), "rows"),
    ],
)
def test_a_section_holds_text_and_numbers(arguments: tuple[Any, ...], problem: str) -> None:
    with pytest.raises(TypeError, match=problem):
        ReportSection(*arguments)


def test_a_run_directory_keeps_the_sections(tmp_path: Path) -> None:
    section = ReportSection("Reading", ("One.",), ("x", "y"), (("a", None), (1, 0.5)))
    metric = probe(report=classmethod(lambda cls, tables, params: [section]))
    run = phaselens.run(toy_lens(), metrics=metric, texts=[letters(5)], out=tmp_path / "run")
    assert report_sections(run.metrics["probe"]) == [section]
    stored = phaselens.open_run(tmp_path / "run")
    assert report_sections(stored.metrics["probe"]) == [section]


@pytest.mark.slow
@pytest.mark.parametrize("returned", ["text", None, [1]])
def test_another_value_fails_the_metric_only(returned: Any) -> None:
    metric = probe(report=classmethod(lambda cls, tables, params: returned))
    run = phaselens.run(toy_lens(), metrics=[metric, "bos-norm"], texts=[letters(5)])
    assert report_sections(run.metrics["probe"]) == []
    assert run.failed == ["probe"]
    assert "return a list of ReportSections" in run.metrics["probe"].failures[0].message
