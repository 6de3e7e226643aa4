"""The page on traps: a section and a table for each, whose numbers the tool measures."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tools.traps import attention, writes
from tools.traps.page import (
    PAGE,
    PAIR,
    REAL_MODEL,
    TRAPS,
    disagreements,
    has_real_model,
    measured_rows,
    number,
    stored_rows,
)

TEXT = PAGE.read_text(encoding="utf-8")
QUANTITIES = {(trap.name, trap.quantity) for trap in TRAPS}


def test_each_trap_has_a_section_with_a_paragraph_and_its_numbers_for_each_model() -> None:
    stored = stored_rows(TEXT)
    assert list(stored) == list(dict.fromkeys(re.findall(r"^### (.*)$", TEXT, re.MULTILINE)))
    assert set(stored) == {trap.name for trap in TRAPS}
    for name, rows in stored.items():
        section = TEXT.partition(f"\n### {name}\n")[2].partition("<!-- generated")[0]
        assert len(section.split()) > 15, name
        expected = {
            (model, quantity)
            for trap, quantity in QUANTITIES
            if trap == name
            for model in (*PAIR, REAL_MODEL)
        }
        assert {row[:2] for row in rows} == expected


def test_on_the_page_ours_is_the_dense_number_and_some_script_is_not() -> None:
    for name, rows in stored_rows(TEXT).items():
        is_off = []
        for _, _, reference, ours, script in rows:
            assert ours == reference or number(ours) == pytest.approx(
                number(reference), rel=1e-3, abs=1e-5
            ), name
            is_off.append(script != reference)
        if name not in ("A layer that writes nothing", "A float32 Gram matrix"):
            assert any(is_off), name


def test_the_page_is_linked_where_metrics_are_chosen() -> None:
    for page in ("metrics.md", "which-metric.md"):
        assert "(traps.md)" in (Path(PAGE).parent / page).read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("model", [*PAIR, REAL_MODEL])
def test_the_tool_measures_what_the_page_says(model: str) -> None:
    """The real model is measured by one pass only; `python -m tools.traps --check` takes two minutes for all."""
    if model == REAL_MODEL and not has_real_model():
        pytest.skip(f"{REAL_MODEL} is not installed")
    traps = (*attention.TRAPS, *writes.TRAPS) if model == REAL_MODEL else TRAPS
    assert disagreements(TEXT, measured_rows([model], traps)) == []
