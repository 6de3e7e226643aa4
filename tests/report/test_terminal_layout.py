"""Tables on a terminal: contents, width, colour, and text that is never read as markup."""

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from phaselens.report.terminal_layout import as_text, console, plain_text, print_run
from phaselens.runs import Run
from tests.report.causal_runs import two_models
from tests.report.runs import TerminalStream, made_run, written_table
from tests.runs.metrics import Probe


def terminal(run: Run, width: int = 100) -> str:
    file = io.StringIO()
    to = Console(file=file, width=width, force_terminal=True, color_system="truecolor", markup=False)
    print_run(run, to)
    return file.getvalue()


def test_layers_go_down_and_models_across_with_interval_and_null() -> None:
    text = as_text(made_run())
    lines = [line.split() for line in text.splitlines()]
    assert ["0", "│", "10.0", "%", "5.0–20.0", "2.0", "%", "│", "10.0", "%", "5.0–20.0", "2.0", "%"] in lines
    assert ["│", "rope", "│", "drope"] in lines
    assert ["2", "│", "–", "–", "–", "│", "–", "–", "–"] in lines


def test_the_definition_is_above_the_table() -> None:
    assert (
        "share of heads with score ≥ 0.3 on position 0, query 0 excluded; threshold, then mean over texts"
        in as_text(made_run()).splitlines()
    )


def test_the_table_is_followed_by_one_line_per_model() -> None:
    lines = [line.split() for line in as_text(made_run()).splitlines()]
    assert ["model", "average", "mean", "score", "texts", "tokens", "positions", "dtype"] in lines
    for label in ("rope", "drope"):
        assert [label, "54.3", "%", "0.412", "60", "20,480", "rope", "float32"] in lines


@pytest.mark.parametrize("labels", [("rope", "drope"), ("a" * 60, "b" * 60)])
def test_two_models_fit_into_a_hundred_columns(labels: tuple[str, ...]) -> None:
    run = made_run(*labels, rows=((1.0, 1.0, 1.0, 1.0),) * 32)
    lines = as_text(run).splitlines()
    assert max(map(len, lines)) <= 100
    assert not any("…" in line for line in lines if "100.0 %" in line)
    assert sum(line.count("100.0 %") for line in lines) == 32 * 4


def test_more_models_than_fit_come_in_tables_below_each_other() -> None:
    labels = tuple(f"model-{number}" for number in range(5))
    lines = as_text(made_run(*labels)).splitlines()
    assert max(map(len, lines)) <= 100
    headers = [line.split() for line in lines if line.strip().startswith("│")]
    assert headers == [["│", labels[0], "│", labels[1]], ["│", labels[2], "│", labels[3]], ["│", labels[4]]]


def test_a_heavy_layer_is_marked_without_colour_and_coloured_on_a_terminal() -> None:
    plain = as_text(made_run())
    assert plain.count("● 62.5 %") == 2
    assert "● 10.0 %" not in plain
    assert "● sink-heavy: half of the heads or more" in plain
    assert "\x1b" not in plain
    assert re.search(r"\x1b\[1;38;2;230;159;0m *● 62.5 %\x1b\[0m", terminal(made_run()))


def test_a_layer_that_does_not_exceed_its_null_is_not_marked() -> None:
    text = as_text(made_run(rows=((0.6, 0.5, 0.7, 0.6), (0.6, 0.5, 0.7, 0.7))))
    assert "●" not in text


def test_colour_follows_the_terminal_and_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    for variable, coloured in (("", True), ("NO_COLOR", False)):
        if variable:
            monkeypatch.setenv(variable, "1")
        file = TerminalStream()
        print_run(made_run(), console(file))
        assert ("\x1b[1;38;" in file.getvalue()) is coloured
    file = io.StringIO()
    print_run(made_run(), console(file))
    assert "\x1b" not in file.getvalue()


def test_labels_and_messages_are_never_read_as_markup() -> None:
    label = "[red]x[/red]\x1b[2J"
    for text in (as_text(made_run(label)), terminal(made_run(label))):
        assert "[red]x[/red]" in text
        assert "\x1b[2J" not in text
    assert "failed: ValueError in update on rope: no [bold]way[/]" in as_text(made_run(failed=True))


def test_warnings_are_printed_below() -> None:
    assert as_text(made_run()).splitlines()[-1] == "note: drope: a warning"


def test_the_bos_policy_is_between_the_tables_and_the_warnings() -> None:
    run = made_run("rope", "[red]drope")
    assert as_text(run).splitlines()[-2:] == [
        "bos: auto (position 0 as the model's tokenizer makes it)",
        "note: drope: a warning",
    ]
    run.models[1] = replace(run.models[1], bos="never")
    assert as_text(run).splitlines()[-2] == "bos: rope auto, [red]drope never"
    run.models.clear()
    assert "bos:" not in as_text(run)


def test_a_metric_without_a_display_shows_its_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    run = made_run()
    result = run.metrics.pop("sinks")
    monkeypatch.setattr(result, "metric", Probe)
    monkeypatch.setattr(result, "params", Probe.Params())
    run.metrics["probe"] = result
    text = as_text(run)
    assert "probe.layers" in text
    assert "0.6250" in text
    assert "probe.summary" in text


def test_a_long_raw_table_says_how_to_get_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    run = made_run(rows=((0.1, 0.1, 0.1, 0.1),) * 40)
    monkeypatch.setattr(run.metrics["sinks"].metric, "display", None)
    assert "20 more rows: --table sinks.layers" in as_text(run)
    assert written_table(run, "table", "layers").count("0.1000") == 40 * 2 * 4


def test_str_of_a_run_is_the_text_of_its_renderer() -> None:
    run = made_run()
    run.renderer = as_text
    assert str(run) == as_text(made_run())


@pytest.mark.parametrize("width", [60, 40])
def test_a_narrow_terminal_stacks_columns_and_loses_no_label(width: int) -> None:
    run = made_run("a-model-of-a-long-name", "b-model", rows=((1.0, 1.0, 1.0, 1.0),) * 3)
    text = plain_text(lambda output: print_run(run, output), width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert width == 40 or "…" not in text
    words = " ".join(text.split())
    for title in ("average", "mean score", "texts 60", "tokens 20,480", "positions rope", "dtype float32"):
        assert words.count(title) >= 2, title
    assert {"a-model-of-a-long-name", "b-model"} <= {line.strip() for line in lines}


@pytest.mark.parametrize("width", [60, 44])
def test_conditions_that_are_too_wide_have_their_columns_below_each_other(width: int) -> None:
    text = plain_text(lambda output: print_run(two_models(), output), width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert text.count("Δ nats") >= 4
    rows = [line for line in lines if line.startswith("write layer")]
    assert sum("1.149" in row for row in rows) == 1
