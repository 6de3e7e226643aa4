"""`phaselens hooks` on a tiny checkpoint."""

from pathlib import Path

from tests.cli.conftest import ErrorLine, Phaselens


def test_hooks_lists_points_once_for_all_layers(phaselens: Phaselens, checkpoint: Path) -> None:
    outcome = phaselens("hooks", checkpoint)
    assert (outcome.code, outcome.err) == (0, "")
    (sink,) = [line for line in outcome.out.splitlines() if "hook_sink" in line]
    assert sink.split()[:5] == ["blocks.{0..1}.attn.hook_sink", "[batch,", "head,", "query]", "float32"]
    filtered = phaselens("hooks", checkpoint, "hook_resid").out
    assert "hook_resid_pre" in filtered
    assert "hook_sink" not in filtered


def test_an_unknown_hook_name_gets_close_matches(error_line: ErrorLine, checkpoint: Path) -> None:
    assert error_line(2, "hooks", checkpoint, "hook_snik").startswith(
        "no hook point contains 'hook_snik'; did you mean hook_sink"
    )
