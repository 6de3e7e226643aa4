"""The page on tasks: its files can be read, its commands run, and its numbers are reproduced."""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from phaselens.cli.entry import run_to_exit_code
from phaselens_plugins._questions import Question, read_questions
from phaselens_plugins.knowledge import KnowledgeParams
from phaselens_plugins.passkey import PasskeyParams

PAGE = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text()
QUESTIONS = re.findall(r"^```jsonl title=(\S+)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def commands() -> Iterator[list[str]]:
    """Yield the arguments of every command in a block of kind `sh`."""
    for block in re.findall(r"^```sh\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE):
        for line in block.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "phaselens"
            yield arguments


def write_questions(folder: Path) -> None:
    for name, content in QUESTIONS:
        (folder / name).write_text(content)


def test_the_pages_questions_can_be_read(tmp_path: Path) -> None:
    write_questions(tmp_path)
    (name, content), *more = QUESTIONS
    assert not more
    questions = read_questions(str(tmp_path / name)).questions
    assert {question.kind for question in questions} == {"contextual", "parametric"}
    keys = {key for line in content.splitlines() for key in json.loads(line)}
    assert keys == set(
        re.findall(r"^\| `(\w+)` \| .*", PAGE.split("Other keys")[0].split("| key | what |")[1], re.M)
    )
    assert isinstance(questions[0], Question)


def test_every_parameter_on_the_page_exists() -> None:
    flags = {spec.flag for params in (PasskeyParams, KnowledgeParams) for spec in params.specs()}
    flags |= {"--texts", "--max-tokens", "--seed", "--table", "--format"}
    assert set(re.findall(r"--[a-z]+(?:-[a-z]+)*", PAGE)) <= flags
    assert {spec.flag for spec in PasskeyParams.specs()} - {"--conditions", "--digits"} <= set(
        re.findall(r"--[a-z]+", PAGE)
    )


@pytest.mark.slow
def test_the_pages_commands_reproduce_its_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_questions(tmp_path)
    printed = []
    for arguments in commands():
        assert run_to_exit_code(arguments) == 0, capsys.readouterr()
        printed.append(capsys.readouterr().out)
    assert len(printed) == 3
    records = list(csv.DictReader(io.StringIO(printed[0])))
    quoted = re.findall(r"^\| (rope|drope) \| (.*) \|$", PAGE, re.MULTILINE)
    assert len(quoted) == len(records) == 4
    columns = ("length", "n", "exact", "ci_high", "digits", "gain")
    for row, (model, numbers) in zip(records, quoted, strict=True):
        assert row["model"] == model
        assert float(row["gain_low"]) > 0
        for column, number in zip(columns, numbers.split(" | "), strict=True):
            digits = len(number.partition(".")[2])
            assert float(row[column]) == pytest.approx(float(number), abs=0.6 * 10**-digits), (model, column)
    assert "baseline, contextual" in printed[1]
    assert "bos-mlp: write layer, contextual" in printed[2]
