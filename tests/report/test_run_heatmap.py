"""Layer × head values of a run in the terminal: the right numbers, one scale, dots for missing heads."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

import phaselens
from phaselens.errors import InputError
from phaselens.plugin import plugins
from phaselens.report.numbers import UNMEASURED
from phaselens.report.run_heatmap import HeadQuantity, print_heatmaps
from tests.toys import letters, toy_lens

TEXTS = [letters(8), letters(11, 4)]


@pytest.fixture(scope="module")
def run() -> Any:
    lenses = [toy_lens(seed=0, label="a"), toy_lens(seed=1, label="b[0m")]
    return phaselens.run(lenses, metrics=["sinks", "bos-write", "bos-norm"], texts=TEXTS)


def find(run: Any, target: str) -> HeadQuantity:
    return HeadQuantity.find(target, {name: plugins().metric(name) for name in run.metrics})


def printed(run: Any, target: str, *, colour: bool = False) -> str:
    file = io.StringIO()
    console = Console(
        file=file, width=100, force_terminal=colour, color_system="truecolor" if colour else None
    )
    print_heatmaps(run, find(run, target), console)
    return file.getvalue()


def test_each_cell_is_the_models_own_value(run: Any) -> None:
    lines = printed(run, "sinks").splitlines()
    for label in ("a", "b[0m"):
        start = next(index for index, line in enumerate(lines) if line == f"sinks: score of {label}")
        for layer in range(2):
            cells = lines[start + 3 + layer].split()
            expected = [
                f"{record['score']:.4f}"
                for record in run.rows("sinks", "heads").records()
                if record["model"] == label and record["layer"] == layer
            ]
            assert cells == [str(layer), *expected]


def test_the_column_can_be_named_and_the_default_is_the_figures(run: Any) -> None:
    assert find(run, "sinks").column == "score"
    assert find(run, "bos-write").column == "true_share"
    assert find(run, "bos-write.value_norm").table == "heads"
    assert find(run, "sinks.share").table == "positions"


def test_models_share_one_scale(run: Any) -> None:
    largest = max(record["score"] for record in run.rows("sinks", "heads").records())
    output = printed(run, "sinks", colour=True)
    full_colour = f"48;2;0;114;178m {largest:.4f}".replace("m ", "m  ")
    assert output.count("48;2;0;114;178m") == 1
    assert full_colour.split("m")[1].strip() in output


def test_a_missing_head_is_a_dot(run: Any) -> None:
    part = run.copy()
    table = part.metrics["sinks"].tables["heads"]
    head, score = table.spec.index("head"), table.spec.index("score")
    table.rows[:] = [(*row[:score], None, *row[score + 1 :]) if row[head] == 1 else row for row in table.rows]
    assert printed(part, "sinks").splitlines()[3].split()[2] == UNMEASURED


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("bos-norm", "bos-norm has no value for each layer and head; sinks, bos-write can be drawn"),
        ("sink", r"'sink' is not in this run; did you mean sinks\?"),
        ("sinks.scor", r"sinks has no column 'scor' by head; did you mean score\?"),
    ],
)
def test_what_cannot_be_drawn_is_refused(run: Any, target: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        find(run, target)
