"""The page on dependence: its commands run, its numbers are what they measure, and its words repeat no other number."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tools.measured_page import PAGE, Cell, cells, number, rewritten

TEXT = PAGE.read_text(encoding="utf-8")
STORED = Path(__file__).parents[1] / "data" / "goldens" / "perplexity.json"
#: Numbers that are no measurement: a threshold of the package, norms and curves that are quoted with their source.
QUOTED = {"7.3", "1.00"}


@pytest.mark.slow
def test_the_commands_run_and_measure_what_the_page_says(tmp_path: Path) -> None:
    found = list(cells(TEXT, tmp_path))
    assert len(found) > 150
    assert [(cell.written, cell.right) for cell in found if not cell.agrees] == []
    for figure in re.findall(r"\(images/causality/([\w-]+\.png)\)", TEXT):
        assert (tmp_path / figure).is_file(), figure
        assert (PAGE.parent / "images" / "causality" / figure).is_file(), figure


def test_every_number_in_the_text_stands_in_a_table() -> None:
    plain = re.sub(r"^```.*?^```$|<!--.*?-->", "", TEXT, flags=re.DOTALL | re.MULTILINE)
    lines = plain.splitlines()
    tables = {cell.strip() for line in lines if line.startswith("|") for cell in line.split("|")}
    words = re.sub(r"`[^`]*`|arXiv:\S+", "", "\n".join(line for line in lines if not line.startswith("|")))
    told = set(re.findall(r"(?<![\w.-])\d[\d,]*\.\d+(?![\w-])", words))
    assert len(told) > 15
    assert told - tables - QUOTED == set()


def test_the_studys_numbers_are_those_it_stored() -> None:
    stored = json.loads(STORED.read_text())
    first = stored["original_interventions"]["values"]
    second, third = stored["layer1_ablation"]["values"], stored["bos_v_ablation"]["values"]
    expected = [
        [first[model]["baseline"]["ppl"] for model in first],
        [first[model]["bos_mlp_ablation"]["ppl"] for model in first],
        [first[model]["bos_mlp_ablation"]["ratio"] for model in first],
        [second[model]["baseline"]["ppl"] for model in second],
        *(
            [second[model][f"layer1_{part}"]["ratio"] for model in second]
            for part in ("mlp", "attn", "both", "bos_only")
        ),
        [third[model]["spike_layer_ratio"] for model in third],
        [third[model]["all_layers_ratio"] for model in third],
    ]
    table = TEXT.partition("<!-- stored -->\n\n")[2].splitlines()
    rows = [line.split(" | ")[1:3] for line in table[2 : 2 + len(expected)]]
    for row, values in zip(rows, expected, strict=True):
        for written, value in zip(row, values, strict=True):
            assert written == f"{value:.{len(written.partition('.')[2])}f}"


def test_a_wrong_number_would_be_seen() -> None:
    assert Cell(0, "0.091", 0.0911).agrees
    assert Cell(0, "0.091", 0.0921).agrees, "one in the last place is rounding"
    assert not Cell(0, "0.091", 0.094).agrees
    assert not Cell(0, "–", 0.094).agrees
    assert not Cell(0, "0.1", None).agrees
    assert Cell(0, "−2,300", -2299.8).agrees
    assert number("−1,234.5") == -1234.5
    page = "| rope | 0.00 | 1,000 |"
    found = [Cell(page.index("0.00"), "0.00", -0.126), Cell(page.index("1,000"), "1,000", None)]
    assert rewritten(page, found) == "| rope | −0.13 | – |"
