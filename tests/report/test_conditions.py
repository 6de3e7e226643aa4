"""Conditions down, models across: rows that belong together stand together, and the mark means something."""

from __future__ import annotations

import csv
import io

import pytest
from rich.console import Console

import phaselens
from phaselens.plugin import CausalMetric, Condition, Edit, Params
from phaselens.report import formats, tables
from phaselens.report.conditions import aligned, condition_grid, contrast_grid, without
from phaselens.runs import Run
from tests.report.causal_runs import (
    Effects,
    baseline,
    causal_run,
    condition,
    contrast,
    shares,
    sweep,
    two_models,
)
from tests.report.runs import made_run
from tests.toys import letters, toy_lens


def lines(run: Run) -> list[str]:
    return tables.as_text(run).splitlines()


def cells(run: Run) -> list[list[str]]:
    return [line.split() for line in lines(run)]


def test_a_models_layer_perplexity_ratio_interval_nats_and_p() -> None:
    shown = cells(two_models())
    titles = ["at", "ppl", "ratio", "95", "%", "CI", "Δ", "nats", "p"]
    assert ["condition", "│", *titles, "│", *titles] in shown
    assert ["baseline", "│", "–", "54.2", *"––––", "│", "–", "62.6", *"––––"] in shown
    rope = ["L1", "62.3", "●", "1.149", "1.112–1.189", "0.139", "<.001"]
    drope = ["L5", "98,440", "1,815", "1,602–2,032", "7.504", "<.001"]
    assert ["write", "layer", "│", *rope, "│", *drope] in shown


def test_a_control_stands_beneath_its_condition_without_that_ones_name() -> None:
    grid = condition_grid(two_models(), two_models().metrics["effects"], Effects.display)  # type: ignore[arg-type]
    assert [(row.brief, row.control) for row in grid.rows] == [
        ("baseline", False),
        ("write layer", False),
        ("└ other position", True),
        ("below the last", False),
        # No contrast says that it is a control: it could not be compared.
        ("other position: below the last", False),
    ]
    assert grid.entries[3][0] is None
    assert grid.entries[4][1] is not None
    assert grid.entries[4][1].cells == ("L0", "–", "–", "–", "–", "–")


def test_a_name_is_only_cut_at_words() -> None:
    assert without("other position: write layer", "write layer") == "other position"
    assert without("random", "a") == "random"
    assert without("top-1-random", "top-1") == "random"
    assert without("massive", "massive") == "massive"
    assert without("a: other: b c", "a: b c") == "other"
    assert without("a b", "a c") == "b"


def test_the_mark_needs_an_effect_beyond_every_control_and_on_the_same_side() -> None:
    def marked(*differences: tuple[float, float, float], low: float = 0.1, high: float = 0.3) -> bool:
        rows = [baseline(), condition("a", None, 1.2, 1.1, 1.35, delta=((low + high) / 2, low, high))]
        contrasts = []
        for place, (least, most, p_value) in enumerate(differences):
            rows.append(condition(f"c{place}", None, 1.0, 0.9, 1.1, delta=(0.0, -0.1, 0.1)))
            contrasts.append(contrast("a", f"c{place}", None, (least + most) / 2, least, most, p_value))
        run = causal_run({"one": {"conditions": rows, "contrasts": contrasts}})
        return "●" in tables.as_text(run)

    beyond = (0.1, 0.3, 0.001)
    assert marked(beyond)
    assert marked(beyond, beyond)
    assert not marked(), "without a control there is nothing to be beyond of"
    assert not marked(beyond, (-0.1, 0.3, 0.001)), "no more than one of its controls"
    assert not marked(beyond, (-0.3, -0.1, 0.001)), "less than one of its controls"
    assert not marked((0.1, 0.3, 0.06)), "p"
    assert not marked(beyond, (0.1, 0.3, 0.03)), "p ≤ 0.05 over two differences is 0.025"
    assert not marked(beyond, low=-0.1), "its own interval"
    assert marked((-0.3, -0.1, 0.001), low=-0.3, high=-0.1), "a gain is a finding too"


def test_the_mark_is_explained_and_coloured() -> None:
    assert (
        "● the ratio's interval excludes 1, and the difference from each of its controls"
        in tables.as_text(two_models())
    )
    file = io.StringIO()
    tables.print_run(
        two_models(),
        Console(file=file, width=100, force_terminal=True, color_system="truecolor", markup=False),
    )
    assert "\x1b[1;38;2;230;159;0m● 1.149\x1b[0m" in file.getvalue()
    assert "\x1b" not in tables.as_text(two_models())


def test_differences_from_controls_stand_below() -> None:
    shown = lines(two_models())
    start = shown.index("condition − control, text by text; repeats of a control are averaged first")
    below = [line.split() for line in shown[start:]]
    titles = ["at", "Δ", "nats", "95", "%", "CI", "p", "d_z", "seeds"]
    assert ["difference", "│", *titles, "│", *titles] in below
    rest = " ".join(" ".join(line) for line in below)
    assert "L1 0.138 0.105–0.172 <.001 1.50 3 │ L5 -0.001 -0.012…0.012 .929 1.50 3" in rest


def test_no_controls_no_second_table() -> None:
    run = sweep({"one": 3}, control=False)
    assert contrast_grid(run, run.metrics["effects"]) is None
    assert "condition − control" not in tables.as_text(run)


def test_under_the_tables_texts_and_predicted_tokens_of_each_model() -> None:
    shown = cells(two_models())
    assert ["model", "texts", "predicted", "tokens", "positions", "dtype"] in shown
    for label in ("rope", "drope"):
        assert [label, "16", "621", "nope", "float32"] in shown, "not the run's 60 texts"


def test_a_sweep_lines_up_though_models_have_different_layers() -> None:
    grid_run = sweep({"one": 3, "two": 5})
    grid = condition_grid(grid_run, grid_run.metrics["effects"], Effects.display)  # type: ignore[arg-type]
    assert [row.brief for row in grid.rows] == ["baseline", "MLP off", "└ elsewhere", *["", "└"] * 4]
    assert [row.name for row in grid.rows[1:]] == ["MLP off", "MLP off elsewhere"] * 5
    layers = [[entry and entry.cells[0] for entry in row] for row in grid.entries]
    assert layers[1::2] == [["L0", "L0"], ["L1", "L1"], ["L2", "L2"], [None, "L3"], [None, "L4"]]


@pytest.mark.parametrize("order", [1, -1])
def test_what_only_one_model_has_stands_where_it_stood_there(order: int) -> None:
    models = [["baseline", "a", "b"], ["baseline", "a", "x", "a", "b", "y"]][::order]
    assert aligned(models) == [(name, 0) for name in ("baseline", "a", "x")] + [("a", 1), ("b", 0), ("y", 0)]
    assert aligned([["a", "baseline"]]) == [("baseline", 0), ("a", 0)]


@pytest.mark.parametrize("labels", [("rope", "drope"), ("a" * 60, "b" * 60)])
def test_two_models_fit_into_a_hundred_columns(labels: tuple[str, str]) -> None:
    run = sweep(dict.fromkeys(labels, 32))
    shown = lines(run)
    assert max(map(len, shown)) <= 100
    assert sum(line.count("│") == 2 for line in shown) >= 2 * 32
    assert sum("L31" in line for line in shown) == 3, (
        "condition, control and difference, both models in one line"
    )


def test_more_models_than_fit_come_below_each_other() -> None:
    run = sweep({f"model-{place}": 2 for place in range(5)}, control=False)
    shown = lines(run)
    assert max(map(len, shown)) <= 100
    heads = [line.split()[1::2] for line in shown if line.lstrip().startswith("│ model-")]
    assert heads == [["model-0", "model-1"], ["model-2", "model-3"], ["model-4"]]


@pytest.mark.parametrize("width", [30, 60, 79, 100, 240])
def test_columns_stand_below_their_titles_at_any_width(width: int) -> None:
    file = io.StringIO()
    tables.print_run(two_models(), Console(file=file, width=width, markup=False, highlight=False))
    table = [line for line in file.getvalue().splitlines() if "│" in line]
    if width >= 60:
        assert max(map(len, file.getvalue().splitlines())) <= width
        for one in ("baseline", "write"):
            (title, row) = (
                next(line for line in table if line.startswith(name)) for name in ("condition", one)
            )
            assert [place for place, sign in enumerate(title) if sign == "│"] == [
                place for place, sign in enumerate(row) if sign == "│"
            ]


def test_hostile_names_are_shown_as_they_are() -> None:
    name = "[red]x[/red]\x1b[2J " + "y" * 200
    wide = "漢字" * 40
    rows = [baseline(), condition(name, 1, 1.1), condition(wide, 2, 1.2), condition("", 3, 1.3)]
    run = causal_run({"[bold]m[/]": {"conditions": rows, "contrasts": []}})
    for shown in (tables.as_text(run), formats.as_markdown(run)):
        assert "\x1b" not in shown
    assert "[red]x[/red]\\x1b[2J" in tables.as_text(run)
    assert "[bold]m[/]" in tables.as_text(run)


def test_one_text_or_a_failed_model_leaves_dashes() -> None:
    rows = [baseline(n_texts=1), condition("a", 1, 1.25, delta=(0.22, None, None), p_value=None)]
    run = causal_run({"one": {"conditions": rows, "contrasts": []}, "two": {}})
    shown = cells(run)
    assert ["a", "│", "L1", "67.8", "1.250", "–", "0.220", "–", "│", *"––––––"] in shown
    assert ["two", "–", "–", "nope", "float32"] in shown


def test_a_display_of_shares_shows_only_shares_in_percent() -> None:
    shown = cells(shares())
    titles = ["right", "95", "%", "CI", "null", "gain", "n"]
    assert ["condition", "│", *titles, "│", *titles] in shown
    row = next(line for line in shown if line[:2] == ["baseline,", "64"])
    text = " ".join(row)
    assert "│ 75.0 % 50.0–90.0 1.0 % 2.190 20 │ – – 1.0 % – 20" in text
    assert ["rope", "62.5", "%", "2,048", "20", "621", "nope", "float32"] in shown


def test_markdown_has_whole_names_and_the_same_cells() -> None:
    shown = formats.as_markdown(two_models()).splitlines()
    assert shown[4].startswith(
        "| condition | rope layer | rope ppl | rope ratio | rope 95 % interval | rope Δ nats | rope p |"
    )
    assert any(
        line.startswith("| other position: write layer | L1 | 54.2 | 1.0003 | 0.9995–1.001 |")
        for line in shown
    )
    assert any(line.startswith("| write layer | L1 | 62.3 | ● 1.149 |") for line in shown)
    assert any(line.startswith("| write layer − other position | L1 | 0.138 |") for line in shown)
    assert "| rope | 16 | 621 | nope | float32 |" in shown
    widths = [line.count("|") for line in shown if line.startswith("|")]
    assert set(widths) == {14, 6}


def test_csv_without_a_name_is_the_displayed_table() -> None:
    rows = list(csv.DictReader(io.StringIO(formats.as_csv(two_models()))))
    assert [row["condition"] for row in rows[:2]] == ["baseline", "write layer"]
    assert (rows[0]["ratio"], rows[0]["layer"], rows[1]["ratio"]) == ("", "", "1.1488")
    assert formats.as_csv(shares()).startswith("model,condition,layer,right")
    assert formats.as_csv(made_run()).startswith("model,layer,sink_rate")
    mixed = two_models()
    mixed.metrics |= made_run().metrics
    assert formats.as_csv(mixed).startswith("model,layer,sink_rate"), "layers, where a metric has them"
    assert formats.usual_table([]) == "layers"


class Values(CausalMetric[Params]):
    """The value of the first token off in every layer, one at a time, and of the second as a control."""

    name, version, title = "values", "1", "values off"

    def conditions(self) -> list[Condition]:
        """For each layer the condition and its control."""
        return [
            Condition(
                name, [Edit(f"blocks.{layer}.attn.hook_v", 0.0, positions=[place])], layer, control_for=of
            )
            for layer in range(self.model.n_layers)
            for place, (name, of) in enumerate([("first", None), ("second", "first")])
        ]


@pytest.fixture(scope="module")
def measured() -> Run:
    lenses = [toy_lens("llama", label="one"), toy_lens("llama-drope-nope", label="two", seed=1)]
    return phaselens.run(lenses, metrics=[Values], texts=[letters(9), letters(14, 5), letters(20, 2)])


def test_what_a_run_measured_is_what_is_shown(measured: Run) -> None:
    assert not measured.failed
    records = [r for r in measured.rows("values", "conditions").records() if r["condition"] == "first"]
    shown = "\n".join(lines(measured))
    for record in records:
        assert isinstance(record["ppl"], float)
        assert f"L{record['layer']}" in shown
        assert f" {record['ppl']:.1f} " in shown
    assert "└ second" in shown
    assert "● " not in shown, "three texts cannot have so small a p"
    assert ["one", "3", "43", "rope", "float32"] in cells(measured)
