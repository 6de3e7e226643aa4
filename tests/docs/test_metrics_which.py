"""The page on which metric answers which question names every built-in metric once, complete."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from phaselens.plugin import CausalMetric, plugins

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "which-metric.md").read_text(encoding="utf-8")
#: Question, metric, the link's target, how it works, what it cannot tell, neighbours.
ROW = re.compile(
    r"^\| ([^|]+) \| \[`([^`]+)`\]\(metrics/([^)]+)\.md\) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", re.MULTILINE
)
ROWS = {match[1]: match for match in ROW.findall(PAGE)}


def built_in() -> list[str]:
    """The names of the built-in metrics."""
    return sorted(plugin.name for plugin in plugins().registered if plugin.distribution == "phaselens")


def test_every_built_in_metric_answers_a_question() -> None:
    assert sorted(ROWS) == built_in()
    assert len(ROW.findall(PAGE)) == len(ROWS)


@pytest.mark.parametrize("name", sorted(ROWS))
def test_each_row_is_complete_and_links_to_the_metrics_page(name: str) -> None:
    question, _, target, how, limit, neighbours = ROWS[name]
    assert question.strip().endswith("?")
    assert target == name
    assert (DOCS / "metrics" / f"{name}.md").is_file()
    assert len(limit.strip()) > 15
    named = re.findall(r"`([^`]+)`", neighbours)
    assert len(named) >= 2
    assert name not in named
    assert set(named) <= set(ROWS)
    assert how.split()[0].strip(",") in ("observes", "intervenes", "asks")


@pytest.mark.parametrize("name", built_in())
def test_metrics_that_intervene_say_so(name: str) -> None:
    """A causal metric intervenes, or asks; one that is not causal observes, or asks."""
    how = ROWS[name][3]
    expected = (
        ("intervenes", "asks") if issubclass(plugins().metric(name), CausalMetric) else ("observes", "asks")
    )
    assert how.split()[0].strip(",") in expected


def test_names_in_the_text_are_metrics_or_their_tables_and_columns() -> None:
    text = ROW.sub("", PAGE).partition("## Questions that need two")[2]
    for name in re.findall(r"`([a-z][a-z_.-]+)`", text):
        metric, _, table = name.partition(".")
        if metric in ROWS and table:
            assert table in [spec.name for spec in plugins().metric(metric).tables]
        elif metric not in ROWS:
            columns = {
                column.name
                for row in ROWS
                for spec in plugins().metric(row).tables
                for column in spec.columns
            }
            assert name in columns


def test_the_page_is_linked_from_the_readme_and_from_the_page_of_metrics() -> None:
    for page in (DOCS.parent / "README.md", DOCS / "metrics.md"):
        assert "which-metric.md" in page.read_text(encoding="utf-8")
