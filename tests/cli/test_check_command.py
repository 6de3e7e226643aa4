"""`phaselens check` on a tiny checkpoint."""

from pathlib import Path

import pytest

from tests.cli.conftest import Phaselens


def test_check_prints_a_table_and_passes_a_sound_model(phaselens: Phaselens, checkpoint: Path) -> None:
    outcome = phaselens("check", checkpoint)
    assert (outcome.code, outcome.err) == (0, "")
    assert "rows of attention sum to one" in outcome.out
    assert "failed" not in outcome.out


def test_check_says_what_failed_with_code_3(
    phaselens: Phaselens, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import phaselens.lens as lens_package

    result = lens_package.CheckResult("rows of attention sum to one", False, 0.5, 1e-5, "worst in layer 1")
    monkeypatch.setattr(lens_package, "run_checks", lambda lens: [result], raising=False)
    outcome = phaselens("check", checkpoint)
    assert outcome.code == 3
    assert ["failed", "rows", "of", "attention"] in [line.split()[:4] for line in outcome.out.splitlines()]
    assert "worst in layer 1" in outcome.out
