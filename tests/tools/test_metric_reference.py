"""The pages of metrics say what the classes say."""

from __future__ import annotations

import pytest
from tools.metric_reference import FOLDER, built_in, current_pages, with_part


def test_the_pages_are_up_to_date() -> None:
    outdated = [
        path.name for path, text in current_pages().items() if path.read_text(encoding="utf-8") != text
    ]
    assert outdated == [], "run: python -m tools.metric_reference"


def test_each_built_in_metric_has_a_page_and_no_other_page_is_there() -> None:
    assert {path.stem for path in FOLDER.glob("*.md")} == {*built_in(), "columns"}


def test_a_page_without_its_generated_part_is_reported() -> None:
    with pytest.raises(ValueError, match="needs one `<!-- generated: sinks -->`"):
        with_part("", "sinks", "text")
