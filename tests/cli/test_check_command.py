"""`phaselens check` on a tiny checkpoint."""

from pathlib import Path

import pytest

from tests.cli.conftest import Phaselens


@pytest.mark.slow
def test_check_prints_a_table_and_passes_a_sound_model(phaselens: Phaselens, checkpoint: Path) -> None:
    outcome = phaselens("check", checkpoint)
    assert (outcome.code, outcome.err) == (0, "")
    assert "rows of attention sum to one" in outcome.out
    assert "failed" not in outcome.out


@pytest.mark.slow
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


@pytest.mark.slow
def test_check_compares_the_loss_with_the_rotation_nulled(phaselens: Phaselens, checkpoint: Path) -> None:
    out = phaselens("check", checkpoint).out
    assert "nats per token with the rotation as configured" in out
    assert "looks like a NoPE model" not in out


@pytest.mark.slow
def test_check_recognises_a_nope_model_that_calls_itself_llama(phaselens: Phaselens, tmp_path: Path) -> None:
    from tests.lens.test_nulled_loss import lying_copy

    outcome = phaselens("check", lying_copy(tmp_path))
    assert outcome.code == 0
    assert "this looks like a NoPE model: it is better without its rotation, by 0.8" in outcome.out
    assert "use --positions nope" in outcome.out
    outcome = phaselens("check", "drope")
    assert "loss with the rotation nulled: not compared: no layer rotates queries and keys" in outcome.out


def test_check_takes_one_adapter_scale(phaselens: Phaselens, checkpoint: Path) -> None:
    outcome = phaselens("check", checkpoint, "--adapter-scale", "0.5")
    assert outcome.code == 2
    assert "has no adapter; write BASE+ADAPTER" in outcome.err
    outcome = phaselens("check", checkpoint, "--adapter-scale", "a=0.5")
    assert outcome.code == 2
    assert "there is one model; write a number without a label" in outcome.err


@pytest.mark.slow
def test_check_takes_the_overrides_of_a_run(phaselens: Phaselens, checkpoint: Path) -> None:
    for scale in ("0.5", f"{checkpoint.name}=0.5"):
        outcome = phaselens("check", checkpoint, "--softmax-scale", scale, "--rope-scaling", "linear:2")
        assert outcome.code == 0
        assert "failed" not in outcome.out


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--softmax-scale", "other=1", "the model is labelled"),
        ("--softmax-scale", "x", "write LABEL=NUMBER"),
        ("--softmax-scale", "0", "give the factor of q·k"),
        ("--rope-scaling", "yarn", "write linear:FACTOR"),
    ],
)
def test_check_refuses_overrides_that_do_not_fit(
    phaselens: Phaselens, checkpoint: Path, option: str, value: str, message: str
) -> None:
    outcome = phaselens("check", checkpoint, option, value)
    assert outcome.code == 2
    assert message in outcome.err
