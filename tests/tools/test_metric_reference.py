"""The page of metrics says what the classes say."""

from __future__ import annotations

import pytest
from tools.metric_reference import PAGE, with_reference


def test_page_is_up_to_date() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert with_reference(page) == page, "run: python tools/metric_reference.py"


def test_a_metric_without_a_section_is_reported() -> None:
    with pytest.raises(ValueError, match=r"docs/metrics\.md needs one"):
        with_reference("")
