"""Heatmaps of sweeps: every cell shows its own number, missing cells are empty, control characters are escaped."""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from phaselens.errors import InputError
from phaselens.patching import Sweep
from phaselens.report import heatmap


def swept(
    values: Any, by: str = "head", *, words: tuple[str, ...] = (), n_heads: int = 4, **options: Any
) -> Sweep:
    values = np.ma.masked_array(np.asarray(values, dtype=float))
    words = words or tuple(f"'w{index}'" for index in range(values.shape[1]))
    return Sweep(
        "k",
        by,
        values,
        1.0,
        3.0,
        "logit_diff('a', 'b')",
        tuple(range(len(values))),
        words,
        words,
        n_heads,
        bos="auto",
        **options,
    )


def colours(sweep: Sweep, width: int = 100) -> str:
    file = io.StringIO()
    to = Console(file=file, width=width, force_terminal=True, color_system="truecolor")
    heatmap.print_sweep(sweep, to)
    return file.getvalue()


def test_each_cell_shows_its_effect_and_a_missing_head_is_a_dot():
    text = heatmap.as_text(swept([[1.5, 1.0], [0.0, 3.0]]))
    assert (
        text.splitlines()[1]
        == "effect on logit_diff('a', 'b'); the full difference is +2.0000, from 1.0000 to 3.0000"
    )
    assert text.splitlines()[3].split() == ["0", "+0.5000", "+0.0000", "·", "·"]
    assert text.splitlines()[4].split() == ["1", "-1.0000", "+2.0000", "·", "·"]


def test_the_bos_policy_is_printed_below():
    sweep = swept([[1.5, 1.0], [0.0, 3.0]])
    sweep = Sweep(**{**vars(sweep), "bos": "clean auto, corrupt never"})
    assert heatmap.as_text(sweep).splitlines()[-1] == "bos: clean auto, corrupt never"


def test_cells_that_were_not_measured_are_empty_and_not_zero():
    sweep = swept([[1.0, 2.0, 3.0, 4.0]], interrupted=True)
    values = sweep.values.copy()
    values[0, 2:] = np.ma.masked
    part = Sweep(**{**vars(sweep), "values": values})
    assert heatmap.as_text(part).splitlines()[3].split() == ["0", "+0.0000", "+1.0000", "·", "·"]
    assert "stopped after 2 of 4 cells" in heatmap.as_text(part)


def test_up_is_blue_down_is_orange_and_no_effect_has_no_colour():
    output = colours(swept([[3.0, -1.0, 1.0, 1.01]]))
    blue, orange = re.escape("48;2;0;114;178m"), re.escape("48;2;213;94;0m")
    assert re.search(blue + r" \+2\.0000", output)
    assert re.search(orange + r" -2\.0000", output)
    assert output.count("48;2") == 2


def test_positions_are_rows_labelled_with_their_tokens():
    sweep = swept(np.arange(6).reshape(2, 3), "pos", words=("'<s>'", r"'\x1b[31m'", "' a'"))
    lines = heatmap.as_text(sweep).splitlines()
    assert lines[2].split() == ["pos", "\\", "layer", "0", "1"]
    assert lines[4].startswith(r"1 '\x1b[31m'")
    assert lines[4].split()[-2:] == ["+0.0000", "+3.0000"]
    assert "\x1b[31m" not in colours(sweep)


def test_ninths_are_printed_where_numbers_do_not_fit():
    values = 1.0 + np.arange(-10, 10).reshape(1, 20, 1) * 0.1
    text = heatmap.as_text(swept(values, "pos-head", n_heads=1), width=60)
    assert all(len(line) <= 60 for line in text.splitlines())
    assert text.splitlines()[3].split()[:3] == ["0.0", "-9", "-8"]
    assert "9 is 1;" in text


def test_only_the_strongest_rows_are_printed_where_there_are_many():
    values = np.ones((1, 200))
    values[0, 150] = 9.0
    text = heatmap.as_text(swept(values, "pos"))
    assert "150 'w150'" in text
    assert "152 more rows" in text


def test_a_figure_has_one_scale_around_zero_and_hatches_missing_cells():
    figure = heatmap.figure(swept([[1.5, 1.0], [0.0, 3.0]]), swept([[1.0, 1.0, 1.0, 2.0]] * 2))
    panels = [axes for axes in figure.axes if axes.images]
    assert [panel.images[0].get_clim() for panel in panels] == [(-2.0, 2.0)] * 2
    assert panels[0].images[0].get_array().mask[:, 2:].all()
    assert panels[0].patch.get_hatch()
    middle = panels[0].images[0].cmap(0.5)
    assert min(middle[:3]) > 0.98


@pytest.mark.parametrize("words", [("'$x^'", "'\\frac'"), ("'漢字'", "'\U0001f600'"), (r"'\x07'", "'%s'")])
def test_a_figure_can_be_drawn_with_any_tokens(tmp_path, words):
    sweep = swept([[1.0, 2.0]], "pos", words=words)
    sweep = Sweep(**{**vars(sweep), "metric": "logit_diff('$', '_')"})
    file = heatmap.save([sweep], tmp_path / "new" / "a.png")
    assert file.read_bytes().startswith(b"\x89PNG")


def test_a_sweep_without_an_effect_can_be_printed_and_drawn(tmp_path):
    flat = swept([[1.0, 1.0]])
    assert "+0.0000" in heatmap.as_text(flat)
    heatmap.save([flat], tmp_path / "a.svg")
    odd = swept([[float("nan"), 2.0]])
    assert "nan" in heatmap.as_text(odd)


def test_errors_of_drawing_and_writing(tmp_path):
    with pytest.raises(InputError, match="no sweep was given"):
        heatmap.figure()
    with pytest.raises(InputError, match="cannot be written"):
        heatmap.save([swept([[1.0, 2.0]])], tmp_path / "a.nothing")
