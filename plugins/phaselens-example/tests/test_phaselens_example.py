"""The pure functions, a planted truth, the null, and the contract that every metric keeps."""

import doctest
import math

import phaselens
import pytest

import phaselens_example
from phaselens_example import DelimiterSinks, delimiter_positions, uniform_score


def test_the_examples_in_docstrings_run() -> None:
    results = doctest.testmod(phaselens_example)
    assert (results.failed, results.attempted > 3) == (0, True)


def test_position_0_is_not_a_delimiter_and_spaces_are_ignored() -> None:
    assert delimiter_positions([".", "a", "Ġ.", "Ċ", ",", "."], ".,\n", 2) == [2, 3]
    assert delimiter_positions(["a", "b"], ".", 1) == []
    assert math.isnan(uniform_score([], 5))


def test_a_planted_sink_on_a_delimiter_is_found(phaselens_planted) -> None:
    planted = phaselens_planted("sink at position 7")
    (mark,) = {word for word in planted.text if word.isupper()}
    request = (DelimiterSinks, {"delimiters": mark})
    run = phaselens.run(planted.lens, metrics=[request], texts=[planted.text])
    (row,) = [
        row
        for row in run.rows("delimiter-sinks", "texts").records()
        if (row["layer"], row["head"]) == (planted.layer, planted.head)
    ]
    assert row["score"] == pytest.approx(1.0)
    assert row["null"] < 0.1
    assert row["n_delimiters"] == 1


def test_a_text_without_a_delimiter_is_missing_with_a_reason(phaselens_lens) -> None:
    run = phaselens.run(phaselens_lens("llama"), metrics=DelimiterSinks, texts=["to be", "or not."])
    assert run.rows("delimiter-sinks", "summary").column("n_texts") == [1]
    assert any("text '0' has no delimiter" in warning for warning in run.warnings)


def test_the_metric_keeps_the_contract(phaselens_check) -> None:
    phaselens_check(DelimiterSinks, {"count": 3, "delimiters": " :"})
