"""Texts on the command line."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from tests.cli.conftest import ErrorLine, Phaselens


def test_texts_are_measured_as_they_are_written(phaselens: Phaselens, checkpoint: Path) -> None:
    texts = ("to be, or not", "[bold]dark[/bold]")
    arguments = [word for text in texts for word in ("--text", text)]
    code, out, _ = phaselens(
        "run", f"a={checkpoint}", "-p", "sinks", *arguments, "--format", "json", "--quiet"
    )
    result = json.loads(out)
    assert code == 0
    digests = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
    assert [text["sha256"] for text in result["texts"]] == digests


def test_texts_from_two_places_are_refused(error_line: ErrorLine, checkpoint: Path) -> None:
    message = error_line(2, "run", checkpoint, "-p", "sinks", "--text", "to be", "--texts", "book.txt")
    assert "--text and --texts" in message


def test_a_plan_counts_the_given_texts(phaselens: Phaselens, checkpoint: Path) -> None:
    arguments = ("--text", "to be", "--text", "or not", "--text", "to be", "--plan", "--format", "json")
    code, out, _ = phaselens("run", f"a={checkpoint}", "-p", "sinks", *arguments, "--quiet")
    assert code == 0
    assert [model["n_texts"] for model in json.loads(out)["models"]] == [3]
