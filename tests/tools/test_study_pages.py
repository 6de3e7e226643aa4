"""The pages of the shipped studies are those that their files give."""

from __future__ import annotations

import pytest
from tools.study_pages import FOLDER, page

from phaselens.runs import read_study, shipped_studies


@pytest.mark.parametrize("name", shipped_studies())
def test_the_page_is_up_to_date(name: str) -> None:
    assert (FOLDER / f"{name}.md").read_text(encoding="utf-8") == page(read_study(name))
