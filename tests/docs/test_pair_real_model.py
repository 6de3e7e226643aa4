"""The page on the real model repeats the stored tables, and its prose only numbers of tables, logs and goldens."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "real-model.md").read_text(encoding="utf-8")
RESULTS = ROOT / "tools" / "recalibrate" / "results"


@pytest.mark.parametrize("name", ["findings.md", "positions.md"])
def test_the_tables_are_the_stored_ones(name: str) -> None:
    for table in (RESULTS / name).read_text(encoding="utf-8").strip().split("\n\n"):
        assert table in PAGE


def test_the_readme_repeats_numbers_of_the_page() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    cells = re.findall(r"\d+(?:\.\d+)? (?:%|×)? ?\([\d.]+–[\d.]+\)", readme)
    assert len(cells) == 10
    for cell in cells:
        assert cell.replace(" ×", "") in PAGE, cell


def test_the_losses_are_those_of_the_cards_and_logs() -> None:
    for twin in ("drope", "rope"):
        card = (ROOT / "src/phaselens/data/models" / f"smollm2-{twin}" / "README.md").read_text(
            encoding="utf-8"
        )
        (loss,) = re.findall(r"in float32: (\d\.\d+) nats", card)
        assert f"{float(loss):.2f}" in PAGE
        rows = [json.loads(line) for line in (RESULTS / f"{twin}.jsonl").read_text().splitlines()]
        assert f"{rows[0]['loss']:.2f}" in PAGE
        assert rows[-1]["tokens"] == 2_883_584


def test_the_numbers_of_the_study_are_the_stored_ones() -> None:
    folder = ROOT / "tests" / "data" / "goldens"
    stored = json.loads((folder / "perplexity.json").read_text())
    layer_1 = stored["layer1_ablation"]["values"]
    ratios = [layer_1[model]["layer1_bos_only"]["ratio"] for model in ("RoPE", "DroPE")]
    assert "{:,.0f} ×, {:.0f} ×".format(*ratios) in PAGE
    bos_v = stored["bos_v_ablation"]["values"]
    ratios = [bos_v[model]["all_layers_ratio"] for model in ("RoPE", "DroPE")]
    assert "{:.1f} ×, {:.1f} ×".format(*ratios) in PAGE
