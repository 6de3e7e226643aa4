"""The HTML report: what it holds, that it loads nothing, and that text stays text."""

from __future__ import annotations

import builtins
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import phaselens
from phaselens.errors import InputError
from phaselens.report.builders import layer_table
from phaselens.report.html import html_report, write_html_report
from phaselens.report.html.charts import layer_chart
from phaselens.report.html.token_text import readable_tokens
from phaselens.report.table import DisplayTable
from phaselens.runs import Run
from phaselens_plugins.sinks import Sinks
from tests.report.html_runs import SCRIPT, TEXTS, hostile_run, large_run
from tests.report.runs import made_run
from tests.runs.metrics import probe
from tests.toys import letters, toy_lens


class Tags(HTMLParser):
    """Collects the page's tags with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return hostile_run(tmp_path_factory.mktemp("reports") / "run", metrics=("sinks", "bos-norm"))


@pytest.fixture(scope="module")
def page(run: Run) -> str:
    return html_report(run)


def layers_of(run: Run) -> DisplayTable:
    """The table of a made run by layer."""
    return layer_table(run, run.metrics["sinks"], Sinks.display)


def data_of(page: str) -> Any:
    """The data that a page embeds."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
    return json.loads(text)


@pytest.mark.slow
def test_the_page_loads_nothing_and_runs_only_its_own_script(page: str) -> None:
    tags = Tags(page)
    assert tags.count("script") == 2
    assert tags.count("link") == tags.count("iframe") == 0
    sources = [value for _, attributes in tags.tags for name, value in attributes.items() if name == "src"]
    assert all(source and source.startswith("data:") for source in sources)
    (policy,) = [
        attributes["content"] for tag, attributes in tags.tags if tag == "meta" and "http-equiv" in attributes
    ]
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "script-src 'sha256-" in policy


def test_markup_and_escape_codes_are_shown_as_text(page: str) -> None:
    assert SCRIPT not in page
    assert "\x1b" not in page
    text = Tags(page).text
    assert SCRIPT in text
    assert r"\x1b[31mred" in text
    labels = [model["label"] for model in data_of(page)["models"]]
    assert labels == [f"one {SCRIPT}", r"two \x1b[31mred\x1b[0m"]


def test_every_metric_has_a_section_and_a_third_partys_adds_one(page: str) -> None:
    headings = re.findall(r'<h2 id="metric-\d+-title">(.*?)</h2>', page)
    assert len(headings) == 3
    text = Tags(page).text
    assert f"Reading {SCRIPT}" in text
    assert "There are 4 rows." in text


def test_the_data_are_those_of_the_tables(run: Run, page: str) -> None:
    data = data_of(page)
    heads = {
        quantity["column"]: quantity
        for quantity in data["metrics"]["sinks"]["heads"]
        if quantity["table"] == "heads"
    }
    records = run.rows("sinks", "heads").records()
    for model, label in enumerate(record.info.label for record in run.models):
        own = [record for record in records if record["model"] == label]
        expected = [record["score"] for record in own]
        assert heads["score"]["models"][model]["values"] == pytest.approx(expected, rel=6e-3)
        null = heads["score"]["models"][model]["null"]
        assert null == pytest.approx(own[0]["null"], rel=6e-3)
    behind = data["metrics"]["sinks"]["texts"]
    assert behind["column"] == "score"
    assert len(behind["models"][0]["0"]["texts"]) == len(TEXTS)
    assert [len(text["models"]) for text in data["tokens"]] == [2, 2, 2]
    assert data["left_out"] == []


def test_a_run_directory_and_the_run_in_memory_give_the_same_sections(run: Run, page: str) -> None:
    assert run.directory is not None
    stored = html_report(phaselens.open_run(run.directory))
    assert data_of(stored) == data_of(page)
    assert Tags(stored).count("section") == Tags(page).count("section")
    assert f"Reading {SCRIPT}" in Tags(stored).text


def test_findings_have_intervals_and_name_models(page: str) -> None:
    (findings,) = re.findall(r'<ol class="findings">(.*?)</ol>', page, re.DOTALL)
    sentences = findings.split("</li>")[:-1]
    assert 1 <= len(sentences) <= 4
    assert all("interval" in sentence for sentence in sentences)


def test_one_text_has_no_findings_and_says_why() -> None:
    single = hostile_run(metrics=("sinks",), texts=TEXTS[:1])
    assert "Intervals need two texts or more." in Tags(html_report(single)).text


def test_a_failed_metric_is_reported(run: Run) -> None:
    text = Tags(html_report(made_run(failed=True))).text
    assert "no [bold]way[/]" in text


def test_the_file_appears_complete_and_replaces_an_earlier_one(run: Run, page: str, tmp_path: Path) -> None:
    target = tmp_path / "new" / "report.html"
    for _ in range(2):
        assert write_html_report(run, target).read_text(encoding="utf-8") == page
    assert [path.name for path in target.parent.iterdir()] == ["report.html"]
    with pytest.raises(InputError, match="cannot be written"):
        write_html_report(run, target / "below.html")


def test_without_jinja_one_line_says_what_to_install(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without_jinja(name: str, *arguments: Any) -> Any:
        if name == "jinja2":
            raise ImportError(name)
        return original(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without_jinja)
    with pytest.raises(InputError, match=r"pip install 'phaselens\[report\]'"):
        html_report(run)


def test_a_chart_has_a_gap_where_a_value_is_missing() -> None:
    chart = layer_chart(layers_of(made_run()))
    assert chart is not None
    assert [len(line.points) for line in chart.lines] == [2, 2]
    assert chart.y_ticks[0].text == "0"
    assert chart.strips[1].tip.splitlines()[1] == "rope: ● 62.5 % (50.0–75.0), null 2.0 %"
    empty = made_run(rows=((None, None, None, None),))
    assert layer_chart(layers_of(empty)) is None


@pytest.mark.slow
def test_a_metrics_own_figure_is_shown_from_its_directory_too(tmp_path: Path) -> None:
    def plot(cls: Any, tables: Any, figure: Any) -> None:
        figure.subplots().plot([1.0, 2.0])

    metric = probe(plots=True, plot=classmethod(plot))
    drawn = phaselens.run(toy_lens(), metrics=metric, texts=[letters(5)], out=tmp_path / "run")
    for run in (drawn, phaselens.open_run(tmp_path / "run")):
        pictures = [attributes for tag, attributes in Tags(html_report(run)).tags if tag == "img"]
        assert [picture["alt"] for picture in pictures] == ["Figure probe; the tables hold its numbers"]
        assert str(pictures[0]["src"]).startswith("data:image/svg+xml;base64,")


def test_names_of_byte_level_tokens_are_decoded() -> None:
    assert readable_tokens(["Ġna", "Ã¯", "ve", "Ċ"]) == [" na", "ï", "ve", "⏎"]


@pytest.mark.slow
def test_a_large_run_stays_below_5_mb_and_says_what_is_left_out() -> None:
    page = html_report(large_run())
    assert len(page.encode()) < 5_000_000
    data = data_of(page)
    assert all(data["metrics"][f"metric-{number}"]["heads"] for number in range(15))
    assert len(data["tokens"]) >= 3
    assert data["left_out"]
    assert data["left_out"][0] in Tags(page).text
