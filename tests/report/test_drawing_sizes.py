"""Widths with units, and figures drawn at a width."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.text import Text
from PIL import Image

from phaselens.errors import InputError
from phaselens.report.drawing_sizes import parse_width, set_width
from phaselens.report.figures import draw, figures
from tests.report.runs import made_run


@pytest.mark.parametrize(
    ("text", "inches"),
    [("3.3in", 3.3), ("84mm", 84 / 25.4), ("8.4 cm", 8.4 / 2.54), ("240pt", 240 / 72), ("4", 4.0)],
)
def test_a_width_has_a_unit(text: str, inches: float) -> None:
    assert parse_width(text) == pytest.approx(inches)


@pytest.mark.parametrize("text", ["wide", "3.3px", "-3in", "0.5in", "9000mm", ""])
def test_another_width_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="figure width"):
        parse_width(text)


def test_letters_shrink_less_than_the_figure() -> None:
    _, figure = next(figures(made_run()))
    sizes = [text.get_fontsize() for text in figure.findobj(Text) if text.get_text()]
    set_width(figure, 3.3)
    narrow = [text.get_fontsize() for text in figure.findobj(Text) if text.get_text()]
    assert figure.get_size_inches()[0] == 3.3
    assert min(narrow) >= 5.5
    assert max(narrow) < max(sizes)


@pytest.mark.slow
def test_figures_are_written_in_the_formats_and_the_width_asked_for(tmp_path: Path) -> None:
    paths = draw(made_run(), tmp_path, formats=["pdf", "png"], width=3.3)
    assert {path.suffix for path in paths} == {".pdf", ".png"}
    assert (tmp_path / "sinks.pdf").read_bytes().startswith(b"%PDF")
    with Image.open(tmp_path / "sinks.png") as picture:
        assert picture.size[0] == round(3.3 * 300)
    with pytest.raises(InputError, match="did you mean pdf"):
        draw(made_run(), tmp_path, formats=["pdff"])
