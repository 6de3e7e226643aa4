"""`phaselens.run` prints the tables of the report; `phaselens.runs.run` prints one line per metric."""

from __future__ import annotations

import inspect
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import phaselens
from phaselens import runs
from phaselens.api import tables_text
from phaselens.report.terminal_layout import as_text
from tests.runs.metrics import probe
from tests.toys import letters, save_checkpoint, toy_lens

TEXTS = [letters(4), letters(9)]


@pytest.fixture(scope="module")
def lens() -> Any:
    return toy_lens(label="toy")


def test_a_run_prints_its_tables(lens: Any) -> None:
    run = phaselens.run(lens, metrics=["sinks"], texts=TEXTS)
    assert str(run) == as_text(run)
    assert "sink rate" in str(run)
    assert str(run.copy()) == str(run)
    assert str(pickle.loads(pickle.dumps(run))) == str(run)  # noqa: S301 - pickled here


def test_the_renderer_is_not_part_of_the_result(lens: Any) -> None:
    run = phaselens.run(lens, metrics=["sinks"], texts=TEXTS)
    plain = replace(run, renderer=None)
    assert plain == run
    assert repr(plain) == repr(run)
    assert plain.to_dict() == run.to_dict()


def test_without_a_renderer_a_run_prints_one_line_per_metric(lens: Any) -> None:
    def fail(metric: object, view: object) -> None:
        raise ValueError("no\nnumber")

    run = runs.run(lens, metrics=["sinks", probe(update=fail)], texts=TEXTS)
    sinks_line, probe_line = str(run).splitlines()
    assert sinks_line == "sinks: toy; texts: 2"
    assert probe_line.startswith("probe: toy; texts: 2; failed: ValueError in update on toy: no number")


def test_the_finished_models_of_an_error_print_their_tables(lens: Any, tmp_path: Path) -> None:
    class Interrupting(runs.Observer):
        def loading(self, label: str) -> None:
            raise KeyboardInterrupt

    checkpoint = save_checkpoint(tmp_path / "second")
    with pytest.raises(KeyboardInterrupt) as caught:
        phaselens.run([lens, str(checkpoint)], metrics=["sinks"], texts=TEXTS, observer=Interrupting())
    partial_run: Any = caught.value.run  # type: ignore[attr-defined]
    assert partial_run.renderer is tables_text
    assert str(partial_run) == as_text(partial_run)


def test_an_error_without_a_run_is_unchanged() -> None:
    with pytest.raises(phaselens.InputError, match="no metric") as caught:
        phaselens.run(metrics=[])
    assert caught.value.run is None


def test_signature_and_docstring_are_those_of_the_run() -> None:
    assert inspect.signature(phaselens.run) == inspect.signature(runs.run)
    assert phaselens.run.__doc__ == runs.run.__doc__
