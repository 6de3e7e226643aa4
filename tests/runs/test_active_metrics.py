"""Whatever a metric raises is recorded as its failure; the results of the others are complete."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

import phaselens
from phaselens.plugin import LayerView, Metric, Params
from phaselens_plugins.sinks import Sinks
from tests.toys import letters, toy_lens


class Unreadable(Exception):  # noqa: N818 - its message is what fails
    """An exception without a message."""

    def __str__(self) -> str:
        raise TypeError("no")


class PanicLike(BaseException):
    """An exception that is no Exception, as a panic in Rust."""


ERRORS: list[tuple[BaseException, str]] = [
    (asyncio.CancelledError(), "CancelledError"),
    (PanicLike("a panic"), "PanicLike in update on llama: a panic"),
    (Unreadable(), "its message cannot be read (TypeError)"),
    (SystemExit(3), "SystemExit"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("error", "message"), ERRORS, ids=range(len(ERRORS)))
def test_a_metric_may_raise_anything(error: BaseException, message: str) -> None:
    class Raising(Metric[Params]):
        name, version = "raising", "1"
        tables = Sinks.tables

        def hooks(self) -> list[str]:
            return ["blocks.{layer}.attn.hook_sink"]

        def update(self, layer: LayerView) -> None:
            raise error

        def compute(self) -> dict[str, Any]:
            return {}

    run = phaselens.run(toy_lens(), metrics=["sinks", Raising], texts=[letters(5), letters(9)])
    assert message in str(run.metrics["raising"].failures[0])
    assert run.failed == ["raising"]
    assert len(run.rows("sinks", "layers").rows) == 2
    json.dumps(run.to_dict(), allow_nan=False)


def test_ctrl_c_in_a_metric_ends_the_run() -> None:
    class Interrupted(Sinks):
        name = "interrupted"

        def update(self, layer: LayerView) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        phaselens.run(toy_lens(), metrics=[Interrupted], texts=[letters(5)])
