"""Many conditions as heatmaps: the numbers of the table, one scale, and a size that can be looked at."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from phaselens.report.figures import figures
from phaselens.runs import Run
from tests.report.causal_runs import baseline, causal_run, condition


def drawn_by_name(run: Run) -> dict[str, Figure]:
    by_name = dict(figures(run))
    assert not run.failed
    for figure in by_name.values():
        figure.draw_without_rendering()
    return by_name


def of_head(name: str, layer: int, head: int, delta: float) -> tuple[Any, ...]:
    row = condition(name, layer, 1.0 + delta, delta=(delta, delta - 1, delta + 1))
    return (*row[:2], head, *row[3:])


def test_conditions_of_heads_are_layers_by_heads_on_one_scale() -> None:
    tables = {
        label: {
            "conditions": [
                baseline(),
                *(
                    of_head("off", layer, head, sign * (layer + head / 10))
                    for layer in range(30)
                    for head in range(12)
                ),
            ],
            "contrasts": [],
        }
        for label, sign in (("one", 1.0), ("two", -0.5))
    }
    del tables["two"]["conditions"][1]
    (figure,) = drawn_by_name(causal_run(tables)).values()
    first, second = (panel.images[0] for panel in figure.axes[:2])
    assert first.get_array().shape == (30, 12)
    assert float(first.get_array()[29, 11]) == 29 + 1.1
    assert np.isnan(np.ma.filled(second.get_array().astype(float), np.nan)[0, 0])
    assert first.get_clim() == second.get_clim() == (-30.1, 30.1)
    assert max(figure.get_size_inches()) < 15
    assert "one, two; 60 texts" in figure.get_suptitle()


@pytest.mark.slow
def test_many_conditions_over_layers_are_rows_and_few_stay_curves() -> None:
    def run_of(n_conditions: int) -> dict[str, Figure]:
        rows = [
            condition(f"position {index}", layer, 1.1, delta=(0.1 * layer, 0.0, 1.0))
            for index in range(n_conditions)
            for layer in range(5)
        ]
        return drawn_by_name(causal_run({"one": {"conditions": [baseline(), *rows], "contrasts": []}}))

    assert not run_of(8)["effects-by-layer"].axes[0].images
    figure = run_of(100)["effects-by-layer"]
    assert figure.axes[0].images[0].get_array().shape == (80, 5)
    assert "20 more conditions are in the table" in figure.get_suptitle()
    assert max(figure.get_size_inches()) < 15
    assert figure.axes[0].get_yticklabels()[3].get_text() == "position 3"
