"""The page on studies lists the shipped ones, and its example is a study."""

from __future__ import annotations

import re
from pathlib import Path

from phaselens.runs import require_measurable, shipped_studies
from phaselens.runs.study_file import parse_study

PAGE = (Path(__file__).parents[2] / "docs" / "studies.md").read_text(encoding="utf-8")


def test_every_shipped_study_is_listed_with_its_page() -> None:
    assert sorted(re.findall(r"\(studies/([\w-]+)\.md\)", PAGE)) == shipped_studies()


def test_the_example_can_be_measured() -> None:
    (example,) = re.findall(r"```toml title=my-study.toml\n(.*?)```", PAGE, re.DOTALL)
    study = parse_study(example, "example")
    require_measurable(study)
    assert [value.layer for value in study.values] == [None, 0, 1, 2]
