"""The definition of a metric's result: one line, also where the metric's `define` fails."""

from __future__ import annotations

from typing import Any

import pytest

from phaselens.runs import MetricResult
from tests.runs.metrics import Probe


class Undefinable(Probe):
    """A metric whose definition cannot be stated."""

    name = "undefinable"
    error: BaseException = ValueError("no words\nfor it")

    @classmethod
    def define(cls, params: Any) -> str:
        raise cls.error


def test_a_definition_that_fails_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    result = MetricResult(Undefinable, Undefinable.Params(), "")
    assert result.definition.startswith("its define failed: ")
    assert "no words" in result.definition
    assert "\n" not in result.definition
    monkeypatch.setattr(Undefinable, "error", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        _ = result.definition
