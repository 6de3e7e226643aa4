"""The page on causality: its commands run and measure its numbers, and its prose repeats only these."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tools.measured_page import PAGE, PageCell, number, page_cells, with_measured_numbers

TEXT = PAGE.read_text(encoding="utf-8")
STORED = Path(__file__).parents[1] / "data" / "goldens" / "perplexity.json"
#: Numbers that are not measured: a threshold of the package, and numbers that are quoted with their source.
QUOTED = {"7.3", "1.00"}


@pytest.mark.slow
def test_the_commands_run_and_measure_what_the_page_says(tmp_path: Path) -> None:
    cells = list(page_cells(TEXT, tmp_path))
    assert len(cells) > 150
    assert [(cell.written, cell.corrected) for cell in cells if not cell.agrees] == []
    for figure in re.findall(r"\(images/causality/([\w-]+\.png)\)", TEXT):
        assert (tmp_path / figure).is_file(), figure
        assert (PAGE.parent / "images" / "causality" / figure).is_file(), figure


def test_every_number_in_the_prose_is_in_a_table() -> None:
    prose_and_tables = re.sub(r"^```.*?^```$|<!--.*?-->", "", TEXT, flags=re.DOTALL | re.MULTILINE)
    lines = prose_and_tables.splitlines()
    tables = {cell.strip() for line in lines if line.startswith("|") for cell in line.split("|")}
    words = re.sub(r"`[^`]*`|arXiv:\S+", "", "\n".join(line for line in lines if not line.startswith("|")))
    numbers = set(re.findall(r"(?<![\w.-])\d[\d,]*\.\d+(?![\w-])", words))
    assert len(numbers) > 15
    assert numbers - tables - QUOTED == set()


def test_the_studys_numbers_equal_the_stored_ones() -> None:
    stored = json.loads(STORED.read_text())
    interventions = stored["original_interventions"]["values"]
    layer_1, bos_v = stored["layer1_ablation"]["values"], stored["bos_v_ablation"]["values"]
    expected = [
        [interventions[model]["baseline"]["ppl"] for model in interventions],
        [interventions[model]["bos_mlp_ablation"]["ppl"] for model in interventions],
        [interventions[model]["bos_mlp_ablation"]["ratio"] for model in interventions],
        [layer_1[model]["baseline"]["ppl"] for model in layer_1],
        *(
            [layer_1[model][f"layer1_{part}"]["ratio"] for model in layer_1]
            for part in ("mlp", "attn", "both", "bos_only")
        ),
        [bos_v[model]["spike_layer_ratio"] for model in bos_v],
        [bos_v[model]["all_layers_ratio"] for model in bos_v],
    ]
    table = TEXT.partition("<!-- stored -->\n\n")[2].splitlines()
    rows = [line.split(" | ")[1:3] for line in table[2 : 2 + len(expected)]]
    for row, values in zip(rows, expected, strict=True):
        for written, value in zip(row, values, strict=True):
            assert written == f"{value:.{len(written.partition('.')[2])}f}"


def test_a_wrong_number_would_be_detected() -> None:
    assert PageCell(0, "0.091", 0.0911).agrees
    assert PageCell(0, "0.091", 0.0921).agrees, "one in the last place is rounding"
    assert not PageCell(0, "0.091", 0.094).agrees
    assert not PageCell(0, "–", 0.094).agrees
    assert not PageCell(0, "0.1", None).agrees
    assert PageCell(0, "−2,300", -2299.8).agrees
    assert number("−1,234.5") == -1234.5
    page = "| rope | 0.00 | 1,000 |"
    cells = [PageCell(page.index("0.00"), "0.00", -0.126), PageCell(page.index("1,000"), "1,000", None)]
    assert with_measured_numbers(page, cells) == "| rope | −0.13 | – |"
