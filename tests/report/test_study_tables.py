"""A study on a terminal: one table, and each reason once beneath it."""

from __future__ import annotations

from phaselens.report.study_tables import as_text
from phaselens.runs import StudyResult
from phaselens.runs.study_file import parse_study
from phaselens.runs.study_result import NO_SUCH_LAYER, STUDY_TABLE
from tests.runs.studies import study_text


def test_reasons_are_numbered_and_missing_values_are_dashes() -> None:
    study = parse_study(study_text(), "small")
    place = ("Table 1", "sinks.layers.sink_rate")
    rows = [
        ("published", "rate", "one", 0, 0.5, 0.75, 0.25, "yes", "", *place),
        ("published", "rate \x1b[31m", "one", 1, 0.5, None, None, "no", "first; it is | second", *place),
        ("published", "rate", "one", 2, 0.5, None, None, "no", f"{NO_SUCH_LAYER} | second", *place),
        ("published", "layer", "two", None, 2.0, 5.0, 3.0, "no", "second", *place),
    ]
    lines = as_text(StudyResult(study, {}, STUDY_TABLE.build(rows))).splitlines()
    assert lines[4].split() == ["rate", "one", "L0", "0.500", "0.750", "0.250", "yes"]
    assert lines[5].split() == [
        *[r"rate", r"\x1b[31m", r"one", r"L1", r"0.500", r"–", r"–", r"no", r"(1,", r"2)"]
    ]
    assert lines[6].split() == ["layer", "two", "2", "5", "3", "no", "(2)"]
    assert lines[7] == "  1 more value of layers that the measured models lack"
    assert lines[8:] == ["(1) first; it is", "(2) second"]
