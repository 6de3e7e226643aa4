"""`phaselens run --workers`: the same output, whatever the number of processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import ErrorLine, Phaselens


@pytest.mark.slow
def test_workers_print_the_same_as_one_process(
    phaselens: Phaselens, checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    arguments = ["run", checkpoint, "-p", "sinks,bos-mlp", "--texts", texts, "--format", "json"]
    result = phaselens(*arguments, "--workers", 2, "--shard-tokens", 12, "--out", tmp_path / "r", "--quiet")
    assert (result.code, result.err) == (0, "")
    assert result.out == phaselens(*arguments, "--shard-tokens", 12).out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shards", "1/2"], "--shards needs a directory for the results of all; add --out DIR"),
        (["--phase", "observations"], "--phase limits what a part computes; add --shards PART/PARTS"),
        (["--address", "auto"], "--address is that of a Ray cluster; add --engine ray"),
        (["--engine", "ray"], "--engine ray needs a directory for the results of all; add --out DIR"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    error_line: ErrorLine, checkpoint: Path, options: list[str], message: str
) -> None:
    assert message in error_line(2, "run", checkpoint, "-p", "sinks", *options)
