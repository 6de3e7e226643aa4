"""Tables of conditions: controls are beneath their conditions, models are aligned, and the mark means an effect."""

from __future__ import annotations

import csv
import io

import pytest
from rich.console import Console

import phaselens
from phaselens.plugin import CausalMetric, Condition, Edit, Params
from phaselens.report.condition_tables import aligned, condition_table, contrast_table, control_name_beside
from phaselens.report.table import DisplayTable
from phaselens.report.table_names import default_table
from phaselens.report.terminal_layout import as_text, print_run
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
from tests.report.runs import made_run, written, written_table
from tests.toys import letters, toy_lens


def lines(run: Run) -> list[str]:
    return as_text(run).splitlines()


def effects_table(run: Run) -> DisplayTable:
    assert Effects.display is not None
    return condition_table(run, run.metrics["effects"], Effects.display)


def cells(run: Run) -> list[list[str]]:
    return [line.split() for line in lines(run)]


def test_a_row_has_layer_perplexity_ratio_interval_nats_and_p() -> None:
    printed_lines = cells(two_models())
    titles = ["at", "ppl", "ratio", "95", "%", "CI", "Δ", "nats", "p"]
    assert ["condition", "│", *titles, "│", *titles] in printed_lines
    assert ["baseline", "│", "–", "54.2", *"––––", "│", "–", "62.6", *"––––"] in printed_lines
    rope = ["L1", "62.3", "●", "1.149", "1.112–1.189", "0.139", "<.001"]
    drope = ["L5", "98,440", "1,815", "1,602–2,032", "7.504", "<.001"]
    assert ["write", "layer", "│", *rope, "│", *drope] in printed_lines


def test_a_control_is_beneath_its_condition_without_repeating_its_name() -> None:
    table = effects_table(two_models())
    assert [(row.short_name, row.is_control, row.is_indented) for row in table.rows] == [
        ("baseline", False, False),
        ("write layer", False, False),
        ("other position", True, True),
        ("below the last", False, False),
        # No contrast names it as a control, as it could not be compared.
        ("other position: below the last", False, False),
    ]
    assert table.rows[3].cells[0] is None
    assert [cell.text for cell in table.printed(table.rows[4].cells[1])] == ["L0", "–", "–", "–", "–", "–"]


def test_a_name_is_only_cut_at_words() -> None:
    assert control_name_beside("other position: write layer", "write layer") == "other position"
    assert control_name_beside("random", "a") == "random"
    assert control_name_beside("top-1-random", "top-1") == "random"
    assert control_name_beside("massive", "massive") == "massive"
    assert control_name_beside("a: other: b c", "a: b c") == "other"
    assert control_name_beside("a b", "a c") == "b"


def test_the_mark_needs_an_effect_beyond_every_control_and_on_the_same_side() -> None:
    def marked(*differences: tuple[float, float, float], low: float = 0.1, high: float = 0.3) -> bool:
        rows = [baseline(), condition("a", None, 1.2, 1.1, 1.35, delta=((low + high) / 2, low, high))]
        contrasts = []
        for index, (least, most, p_value) in enumerate(differences):
            rows.append(condition(f"c{index}", None, 1.0, 0.9, 1.1, delta=(0.0, -0.1, 0.1)))
            contrasts.append(contrast("a", f"c{index}", None, (least + most) / 2, least, most, p_value))
        run = causal_run({"one": {"conditions": rows, "contrasts": contrasts}})
        return "●" in as_text(run)

    beyond = (0.1, 0.3, 0.001)
    assert marked(beyond)
    assert marked(beyond, beyond)
    assert not marked(), "without a control there is no difference"
    assert not marked(beyond, (-0.1, 0.3, 0.001)), "as large as one of its controls"
    assert not marked(beyond, (-0.3, -0.1, 0.001)), "smaller than one of its controls"
    assert not marked((0.1, 0.3, 0.06)), "p"
    assert marked(beyond, (0.1, 0.3, 0.03)), "the smaller p leaves one difference"
    assert not marked((0.1, 0.3, 0.03), (0.1, 0.3, 0.03)), "two differences of p = 0.03 are adjusted to 0.06"
    assert not marked(beyond, low=-0.1), "its own interval"
    assert marked((-0.3, -0.1, 0.001), low=-0.3, high=-0.1), "a gain is an effect, too"


def test_the_mark_is_explained_and_coloured() -> None:
    assert "● the ratio's interval excludes 1, and the difference from each of its controls" in as_text(
        two_models()
    )
    file = io.StringIO()
    print_run(
        two_models(),
        Console(file=file, width=100, force_terminal=True, color_system="truecolor", markup=False),
    )
    assert "\x1b[1;38;2;230;159;0m● 1.149\x1b[0m" in file.getvalue()
    assert "\x1b" not in as_text(two_models())


def test_differences_from_controls_are_printed_below() -> None:
    text_lines = lines(two_models())
    start = next(
        i for i, line in enumerate(text_lines) if line.startswith("condition − control, text by text")
    )
    difference_lines = [line.split() for line in text_lines[start:]]
    titles = ["at", "Δ", "nats", "95", "%", "CI", "p", "d_z", "seeds"]
    assert ["difference", "│", *titles, "│", *titles] in difference_lines
    differences = " ".join(" ".join(line) for line in difference_lines)
    assert "L1 0.138 0.105–0.172 <.001 1.50 3 │ L5 -0.001 -0.012…0.012 .929 1.50 3" in differences


def test_without_controls_there_is_no_second_table() -> None:
    run = sweep({"one": 3}, control=False)
    assert contrast_table(run, run.metrics["effects"]) is None
    assert "condition − control" not in as_text(run)


def test_texts_and_predicted_tokens_of_each_model_are_printed_below_the_tables() -> None:
    printed_lines = cells(two_models())
    assert ["model", "texts", "predicted", "tokens", "positions", "dtype"] in printed_lines
    for label in ("rope", "drope"):
        assert [label, "16", "621", "nope", "float32"] in printed_lines, "not the run's 60 texts"


def test_a_sweep_lines_up_though_models_have_different_layers() -> None:
    table = effects_table(sweep({"one": 3, "two": 5}))
    assert [row.short_name for row in table.rows] == ["baseline", "MLP off", "elsewhere", *["", ""] * 4]
    assert [row.is_indented for row in table.rows] == [False, *[False, True] * 5]
    assert [row.name for row in table.rows[1:]] == ["MLP off", "MLP off elsewhere"] * 5
    layers = [[cells and cells[0].value for cells in row.cells] for row in table.rows]
    assert layers[1::2] == [[0, 0], [1, 1], [2, 2], [None, 3], [None, 4]]


@pytest.mark.parametrize("order", [1, -1])
def test_a_row_of_one_model_keeps_its_position(order: int) -> None:
    models = [["baseline", "a", "b"], ["baseline", "a", "x", "a", "b", "y"]][::order]
    assert aligned(models) == [(name, 0) for name in ("baseline", "a", "x")] + [("a", 1), ("b", 0), ("y", 0)]
    assert aligned([["a", "baseline"]]) == [("baseline", 0), ("a", 0)]


@pytest.mark.parametrize("labels", [("rope", "drope"), ("a" * 60, "b" * 60)])
def test_two_models_fit_into_a_hundred_columns(labels: tuple[str, str]) -> None:
    run = sweep(dict.fromkeys(labels, 32))
    text_lines = lines(run)
    assert max(map(len, text_lines)) <= 100
    assert sum(line.count("│") == 2 for line in text_lines) >= 2 * 32
    assert sum("L31" in line for line in text_lines) == 3, (
        "condition, control and difference, both models in one line"
    )


def test_more_models_than_fit_come_below_each_other() -> None:
    run = sweep({f"model-{index}": 2 for index in range(5)}, control=False)
    text_lines = lines(run)
    assert max(map(len, text_lines)) <= 100
    heads = [line.split()[1::2] for line in text_lines if line.lstrip().startswith("│ model-")]
    assert heads == [["model-0", "model-1"], ["model-2", "model-3"], ["model-4"]]


@pytest.mark.slow
@pytest.mark.parametrize("width", [30, 60, 79, 100, 240])
def test_columns_are_aligned_with_their_titles_at_any_width(width: int) -> None:
    file = io.StringIO()
    print_run(two_models(), Console(file=file, width=width, markup=False, highlight=False))
    table = [line for line in file.getvalue().splitlines() if "│" in line]
    if width >= 60:
        assert max(map(len, file.getvalue().splitlines())) <= width
        for row_name in ("baseline", "write"):
            (title, row) = (
                next(line for line in table if line.startswith(name)) for name in ("condition", row_name)
            )
            assert [index for index, sign in enumerate(title) if sign == "│"] == [
                index for index, sign in enumerate(row) if sign == "│"
            ]


def test_names_with_markup_and_control_characters_are_escaped() -> None:
    name = "[red]x[/red]\x1b[2J " + "y" * 200
    wide = "漢字" * 40
    rows = [baseline(), condition(name, 1, 1.1), condition(wide, 2, 1.2), condition("", 3, 1.3)]
    run = causal_run({"[bold]m[/]": {"conditions": rows, "contrasts": []}})
    for text in (as_text(run), written(run, "markdown")):
        assert "\x1b" not in text
    assert "[red]x[/red]\\x1b[2J" in as_text(run)
    assert "[bold]m[/]" in as_text(run)


def test_one_text_or_a_failed_model_leaves_dashes() -> None:
    rows = [baseline(n_texts=1), condition("a", 1, 1.25, delta=(0.22, None, None), p_value=None)]
    run = causal_run({"one": {"conditions": rows, "contrasts": []}, "two": {}})
    printed_lines = cells(run)
    assert ["a", "│", "L1", "67.8", "1.250", "–", "0.220", "–", "│", *"––––––"] in printed_lines
    assert ["two", "–", "–", "nope", "float32"] in printed_lines


def test_a_display_of_shares_shows_only_shares_in_percent() -> None:
    printed_lines = cells(shares())
    titles = ["right", "95", "%", "CI", "null", "gain", "n"]
    assert ["condition", "│", *titles, "│", *titles] in printed_lines
    row = next(line for line in printed_lines if line[:2] == ["baseline,", "64"])
    text = " ".join(row)
    assert "│ 75.0 % 50.0–90.0 1.0 % 2.190 20 │ – – 1.0 % – 20" in text
    assert ["rope", "62.5", "%", "2,048", "20", "621", "nope", "float32"] in printed_lines


def test_markdown_has_whole_names_and_the_same_cells() -> None:
    markdown_lines = written(two_models(), "markdown").splitlines()
    assert markdown_lines[4].startswith("95 % interval: paired percentile bootstrap over texts; p: adjusted")
    assert markdown_lines[6].startswith(
        "| condition | rope layer | rope ppl | rope ratio | rope 95 % interval | rope Δ nats | rope p |"
    )
    assert any(
        line.startswith("| other position: write layer | L1 | 54.2 | 1.0003 | 0.9995–1.001 |")
        for line in markdown_lines
    )
    assert any(line.startswith("| write layer | L1 | 62.3 | ● 1.149 |") for line in markdown_lines)
    assert any(line.startswith("| write layer − other position | L1 | 0.138 |") for line in markdown_lines)
    assert "| rope | 16 | 621 | nope | float32 |" in markdown_lines
    widths = [line.count("|") for line in markdown_lines if line.startswith("|")]
    assert set(widths) == {14, 6}


def test_csv_without_a_name_is_the_displayed_table() -> None:
    rows = list(csv.DictReader(io.StringIO(written_table(two_models(), "csv"))))
    assert [row["condition"] for row in rows[:2]] == ["baseline", "write layer"]
    assert (rows[0]["ratio"], rows[0]["layer"], rows[1]["ratio"]) == ("", "", "1.1488")
    assert written_table(shares(), "csv").startswith("model,condition,layer,right")
    assert written_table(made_run(), "csv").startswith("model,layer,sink_rate")
    mixed = two_models()
    mixed.metrics |= made_run().metrics
    assert written_table(mixed, "csv").startswith("model,layer,sink_rate"), "layers, where a metric has them"
    assert default_table([]) == "layers"


class Values(CausalMetric[Params]):
    """The value of the first token off in every layer, one at a time, and of the second as a control."""

    name, version, title = "values", "1", "values off"

    def conditions(self) -> list[Condition]:
        """Return the condition and its control for each layer."""
        return [
            Condition(
                name, [Edit(f"blocks.{layer}.attn.hook_v", 0.0, positions=[position])], layer, control_for=of
            )
            for layer in range(self.model.n_layers)
            for position, (name, of) in enumerate([("first", None), ("second", "first")])
        ]


@pytest.fixture(scope="module")
def measured() -> Run:
    lenses = [toy_lens("llama", label="one"), toy_lens("llama-drope-nope", label="two", seed=1)]
    return phaselens.run(lenses, metrics=[Values], texts=[letters(9), letters(14, 5), letters(20, 2)])


def test_the_tables_hold_what_the_run_measured(measured: Run) -> None:
    assert not measured.failed
    records = [r for r in measured.rows("values", "conditions").records() if r["condition"] == "first"]
    text = "\n".join(lines(measured))
    for record in records:
        assert isinstance(record["ppl"], float)
        assert f"L{record['layer']}" in text
        assert f" {record['ppl']:.1f} " in text
    assert "└ second" in text
    assert "● " not in text, "three texts cannot have so small a p"
    assert ["one", "3", "43", "rope", "float32"] in cells(measured)
