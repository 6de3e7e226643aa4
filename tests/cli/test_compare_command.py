"""`phaselens compare`: two runs or two models of a run, refusals, and what is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import phaselens as library
from phaselens.cli.compare_command import compare as compare_command
from phaselens.cli.entry import run_to_exit_code
from phaselens.runs import DIFFERENCES
from tests.cli.conftest import ErrorLine, Phaselens
from tests.toys import letters, save_checkpoint


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs `pair` (models a and b), `second` (b), and `never` (b without BOS)."""
    folder = tmp_path_factory.mktemp("studies")
    (folder / "texts.txt").write_text("\n".join(letters(length, length) for length in (5, 12, 7, 9)))
    models = [f"{name}={save_checkpoint(folder / name, seed=seed)}" for seed, name in enumerate("ab")]
    for name, words in (("pair", models), ("second", models[1:]), ("never", [*models[1:], "--bos", "never"])):
        options = [
            "-p",
            "sinks",
            "--texts",
            str(folder / "texts.txt"),
            "--quiet",
            "--out",
            str(folder / name),
        ]
        assert run_to_exit_code(["run", *words, *options]) == 0
    return folder


@pytest.mark.slow
def test_two_models_of_a_run_are_compared(phaselens: Phaselens, studies: Path) -> None:
    expected = library.compare(library.open_run(studies / "pair"))
    printed = phaselens("compare", studies / "pair")
    assert (printed.code, printed.err) == (0, "")
    assert " ".join(printed.out.split()) == " ".join(str(expected).split())
    values = json.loads(phaselens("compare", studies / "pair", "--format", "json").out)
    assert values == json.loads(json.dumps(expected.to_dict()))
    back = json.loads(phaselens("compare", studies / "pair", "--models", "b,a", "--format", "json").out)
    assert (back["first"], back["second"]) == ("b", "a")


@pytest.mark.slow
def test_two_runs_are_compared_with_notes_and_a_figure(
    phaselens: Phaselens, studies: Path, tmp_path: Path
) -> None:
    pair, second = studies / "pair", studies / "second"
    result = phaselens(
        "compare", pair, second, "--models", "a,b", "--format", "csv", "--figure", tmp_path / "c.png"
    )
    assert result.code == 0
    assert result.out.startswith("metric,table,value,")
    assert result.err.splitlines() == [
        "phaselens: note: 6 differences were tested by sign flips of texts; "
        "p is adjusted for the rows of its table (Holm)",
        f"phaselens: note: the figure is {tmp_path / 'c.png'}",
    ]
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_not_comparable_is_refused_until_it_is_allowed(
    phaselens: Phaselens, error_line: ErrorLine, studies: Path
) -> None:
    runs = (studies / "second", studies / "never")
    message = error_line(2, "compare", *runs)
    assert message.startswith("not comparable: bos: b and b were measured with bos auto and with bos never")
    assert message.endswith("(--allow bos compares them nevertheless)")
    values = json.loads(phaselens("compare", *runs, "--allow", "bos", "--format", "json").out)
    assert [difference.partition(":")[0] for difference in values["allowed"]] == ["bos"]
    markdown = phaselens("compare", *runs, "--allow", "bos,texts", "--format", "markdown").out
    assert markdown.startswith("### b (never) − b (second)\n")
    assert "- note: compared although they differ: bos: " in markdown


def test_wrong_arguments_are_refused(error_line: ErrorLine, studies: Path, tmp_path: Path) -> None:
    assert "holds no run.json" in error_line(2, "compare", tmp_path)
    assert "write two labels, A,B" in error_line(2, "compare", studies / "pair", "--models", "a")
    assert "did you mean bos?" in error_line(2, "compare", studies / "pair", "--allow", "boss")
    assert "name two of them" in error_line(2, "compare", studies / "second")
    assert "must end with .png" in error_line(2, "compare", studies / "pair", "--figure", "c")
    assert "Missing argument 'RUN_A'" in error_line(2, "compare")


def test_the_help_names_everything_that_can_differ() -> None:
    (option,) = (parameter for parameter in compare_command.params if parameter.name == "allowed")
    assert f"record it: {', '.join(DIFFERENCES)};" in option.help  # type: ignore[attr-defined]
