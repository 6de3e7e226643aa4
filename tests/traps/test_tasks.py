"""Traps of tasks: what a search for words does, and intervals of a few prompts."""

from __future__ import annotations

import pytest
from tools.traps.tasks import STATEMENTS, normal_interval_script, parsed_accuracy_script, parsed_script

from phaselens.uncertainty import wilson_interval
from phaselens_plugins._scores import score_options


@pytest.mark.parametrize(
    ("answer", "parsed"),
    [
        ("Yes.", True),
        ("No.", False),
        ("I am not a man, sir", False),  # "not" holds the letters of "no"
        ("Nobody knows", False),
        ("Yesterday it rained", True),
        ("It is hot", None),
    ],
)
def test_a_search_for_words_finds_parts_of_words(answer: str, parsed: bool | None) -> None:
    assert parsed_script(answer) is parsed


def test_an_accuracy_of_parsed_answers_may_be_of_one_answer() -> None:
    answers = ["Yes", *["It is"] * (len(STATEMENTS) - 1)]
    assert parsed_accuracy_script(answers) == 1.0
    assert parsed_accuracy_script(["It is"] * len(STATEMENTS)) is None
    assert score_options([-2.0, -2.0], [1, 1], 0).correct == 0.0, "a tie is scored, and wrong"


def test_five_of_five_leave_room_below_one() -> None:
    assert normal_interval_script(5, 5) == (1.0, 1.0)
    assert wilson_interval(5, 5).ci_low == pytest.approx(5 / (5 + 1.959964**2), rel=1e-6)
