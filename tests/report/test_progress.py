"""The progress bar: on a terminal's stderr, and nowhere else."""

import io
import sys

import pytest

from phaselens.report.progress import ProgressBar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drawn(monkeypatch: pytest.MonkeyPatch, stderr: io.StringIO, *, quiet: bool = False) -> str:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stderr", stderr)
    with ProgressBar(quiet=quiet) as bar:
        bar.loading("[red]a model[/red]")
        bar.measuring("[red]a model[/red]", 100)
        bar.advance(60)
        bar._progress.refresh()
    return stderr.getvalue()


def test_it_shows_the_model_and_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = drawn(monkeypatch, Terminal())
    assert "measuring [red]a model[/red]" in shown
    assert "60 %" in shown


def test_conditions_have_a_bar_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = Terminal()
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


def test_it_is_off_when_quiet_or_where_stderr_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert drawn(monkeypatch, Terminal(), quiet=True) == ""
    assert drawn(monkeypatch, io.StringIO()) == ""
