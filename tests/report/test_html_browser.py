"""The report in a real browser: no error, no network, and everything that one can do with it works.

Chromium comes from the system (Debian's package `chromium`), and axe-core from npm; both are installed by `.ci/run`,
not by the tests.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from phaselens.report.html import write_html_report
from tests.report.html_runs import ESCAPE, SCRIPT, hostile_run

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
AXE = Path(
    os.environ.get("PHASELENS_AXE", ROOT / ".venv" / "npm" / "node_modules" / "axe-core" / "axe.min.js")
)
SIZES = {"wide": (1280, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed; apt-get install chromium")
    with playwright.sync_playwright() as started:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        running = started.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield running
        running.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_html_report(hostile_run(), tmp_path_factory.mktemp("html") / "report.html")


class OpenedPage:
    """A page opened from disk, the messages of its console, and the requests that it made."""

    def __init__(self, browser: Any, file: Path, size: str = "wide", scheme: str = "light") -> None:
        width, height = SIZES[size]
        self.page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())

    def close(self) -> None:
        """Close the page, and require that it was silent and loaded nothing."""
        assert self.messages == []
        assert [url for url in self.requests if not url.startswith(("file:", "data:", "blob:"))] == []
        self.page.close()


@pytest.fixture
def opened(browser: Any, file: Path) -> Iterator[OpenedPage]:
    page = OpenedPage(browser, file)
    yield page
    page.close()


@pytest.fixture
def page(opened: OpenedPage) -> Any:
    return opened.page


def test_markup_in_names_is_text(page: Any) -> None:
    assert page.evaluate("window.hacked") is None
    title = page.locator("h1").inner_text()
    assert SCRIPT in title
    assert r"\x1b[31mred\x1b[0m" in title
    assert ESCAPE not in page.content()


def test_a_table_is_sorted_by_its_column_and_filtered(page: Any) -> None:
    table = page.locator("section.metric table.sortable").first
    column = table.locator("thead tr").last.locator("th").nth(1)
    values = table.locator("tbody tr td:nth-of-type(1)")

    def keys() -> list[float]:
        return [float(key) for key in values.evaluate_all("cells => cells.map(cell => cell.dataset.key)")]

    original = keys()
    column.locator("button").click()
    assert column.get_attribute("aria-sort") == "descending"
    assert keys() == sorted(original, reverse=True)
    column.locator("button").press("Enter")
    assert column.get_attribute("aria-sort") == "ascending"
    assert keys() == sorted(original)
    column.locator("button").click()
    assert keys() == original


def test_a_result_table_opens_filters_and_is_downloaded(page: Any, tmp_path: Path) -> None:
    details = page.locator(".data-tables details", has_text="one row per text, layer and head").first
    details.locator("summary").click()
    rows = details.locator("tbody tr")
    rows.first.wait_for()  # the table is built once its details have opened
    n_rows = rows.count()
    details.locator("input").fill("script")
    assert 0 < rows.count() < n_rows
    with page.expect_download() as download:
        details.get_by_role("button", name="Download CSV").click()
    target = tmp_path / "table.csv"
    download.value.save_as(target)
    assert target.read_text(encoding="utf-8").startswith("model,text,layer,head,score")


def test_hover_reads_a_heads_value_and_null_and_a_click_pins_it_everywhere(page: Any) -> None:
    canvas = page.locator("section.metric canvas[tabindex]").first
    canvas.hover(position={"x": 60, "y": 30})
    tip = page.locator("#tip")
    assert "layer 1, head 1" in tip.inner_text()
    assert "null" in tip.inner_text()
    canvas.click(position={"x": 60, "y": 30})
    pinned = page.locator("#pinned")
    assert pinned.is_visible()
    assert "layer 1, head 1" in pinned.locator("h2").inner_text()
    quantities = pinned.locator("tbody th").all_inner_texts()
    assert {quantity.partition(".")[0] for quantity in quantities} >= {"sinks", "spread"}
    page.keyboard.press("Escape")
    assert not pinned.is_visible()


def test_heads_are_read_and_pinned_by_keyboard(page: Any) -> None:
    canvas = page.locator("section.metric canvas[tabindex]").first
    canvas.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    assert "layer 1, head 1" in page.locator("output.readout").first.inner_text()
    page.keyboard.press("Enter")
    assert page.locator("#pinned").is_visible()


def test_a_layer_leads_to_its_texts_and_a_text_to_its_tokens(page: Any) -> None:
    section = page.locator("section.metric").first
    section.locator("button.layer").nth(1).click()
    behind = section.locator(".behind")
    assert behind.locator("select").nth(1).input_value() == "1"
    assert behind.locator("li").count() == 8
    behind.get_by_role("button", name="Show the tokens").first.click()
    words = page.locator("#text-view .words")
    assert page.locator("#text-view select").nth(2).input_value() == "1"
    assert words.locator("span").first.inner_text() == "<s>"
    tints = words.locator("span").evaluate_all(
        "spans => spans.map(span => span.style.getPropertyValue('--t'))"
    )
    assert max(map(float, tints)) == 1.0
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    readout = page.locator("#text-view output").inner_text()
    assert "position 1" in readout
    assert "attention received" in readout
    assert "residual norm" in readout


def test_the_curve_shows_every_models_value_on_hover(page: Any) -> None:
    page.locator(".strip").nth(1).hover(force=True)
    tip = page.locator("#tip").inner_text()
    assert tip.startswith("layer 1\n")
    assert f"one {SCRIPT}: " in tip


def test_the_data_and_the_command_can_be_taken_along(browser: Any, tmp_path: Path) -> None:
    file = write_html_report(
        hostile_run(metrics=("bos-norm",)), tmp_path / "r.html", command=["phaselens", "run", "-p", "a b"]
    )
    opened = OpenedPage(browser, file)
    opened.page.locator("#copy").click()
    opened.page.wait_for_function("document.querySelector('#copy').textContent === 'Copied'")
    assert opened.page.locator("#command").inner_text() == "phaselens run -p 'a b'"
    with opened.page.expect_download() as download:
        opened.page.locator("#export").click()
    target = tmp_path / "data.json"
    download.value.save_as(target)
    assert json.loads(target.read_text(encoding="utf-8"))["schema"] == "phaselens.report/1"
    opened.close()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_overflows_and_axe_finds_nothing_serious(
    browser: Any, file: Path, size: str, scheme: str, tmp_path: Path
) -> None:
    opened = OpenedPage(browser, file, size, scheme)
    widths = opened.page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert widths[0] <= widths[1]
    background = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) > 384) == (scheme == "light")
    assert len(opened.page.screenshot(path=tmp_path / "page.png")) > 10_000
    if AXE.is_file():
        opened.page.locator(".data-tables summary").first.click()
        opened.page.locator(".data-tables details[open] tbody tr").first.wait_for()
        opened.page.evaluate(AXE.read_text(encoding="utf-8"))
        violations = opened.page.evaluate(
            "axe.run().then(r => r.violations.map(v => [v.impact, v.id, v.nodes[0].html]))"
        )
        assert [v for v in violations if v[0] in ("serious", "critical")] == []
    opened.close()


def test_the_theme_can_be_chosen(page: Any) -> None:
    button = page.locator("#theme")
    colours = []
    for _ in range(2):
        button.click()
        colours.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert colours[0] != colours[1]
    assert button.inner_text() == "Theme: dark"


def test_a_printed_page_leaves_controls_out(page: Any) -> None:
    page.emulate_media(media="print")
    assert not page.locator("#theme").is_visible()
    assert not page.locator(".contents").is_visible()
    assert page.locator("section.metric table").first.is_visible()
