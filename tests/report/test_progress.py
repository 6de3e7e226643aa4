"""The progress bar is drawn on a stderr that is a terminal, and nowhere else."""

import io
import sys

import pytest

from phaselens.report.progress import ProgressBar
from tests.report.runs import TerminalStream


def drawn(monkeypatch: pytest.MonkeyPatch, stderr: io.StringIO, *, quiet: bool = False) -> str:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stderr", stderr)
    with ProgressBar(quiet=quiet) as bar:
        bar.loading("[red]a model[/red]")
        bar.measuring("[red]a model[/red]", 100)
        bar.advance(60)
        bar._progress.refresh()
    return stderr.getvalue()


def test_the_bar_shows_the_model_and_the_percentage(monkeypatch: pytest.MonkeyPatch) -> None:
    output = drawn(monkeypatch, TerminalStream())
    assert "measuring [red]a model[/red]" in output
    assert "60 %" in output


def test_conditions_have_a_separate_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = TerminalStream()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stderr", stderr)
    with ProgressBar() as bar:
        bar.measuring("rope", 100)
        bar.advance(100)
        bar.measuring("rope, conditions", 400)
        bar.advance(100)
        assert [task.description for task in bar._progress.tasks] == ["measuring rope, conditions"]
        assert bar._progress.tasks[0].percentage == 25
        bar._progress.refresh()
    assert "25 %" in stderr.getvalue()


def test_the_bar_moves_within_a_batch_and_a_batch_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stderr", TerminalStream())
    with ProgressBar() as bar:
        bar.measuring("rope", 100)
        percentages = []
        for verb, n_tokens in (("reading", 20.0), ("reading", 45.0), ("advance", 50), ("reading", 25.0)):
            getattr(bar, verb)(n_tokens)
            percentages.append(bar._progress.tasks[0].percentage)
        assert percentages == [20, 45, 50, 75]


def test_the_bar_is_off_when_quiet_or_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert drawn(monkeypatch, TerminalStream(), quiet=True) == ""
    assert drawn(monkeypatch, io.StringIO()) == ""
