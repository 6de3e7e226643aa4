"""Comparison of the fields of two LossComparisons."""

from __future__ import annotations

import dataclasses

import pytest

from phaselens.uncertainty import LossComparison


def numeric_fields(comparison: LossComparison) -> dict[str, float | None]:
    """All fields except the reasons."""
    return {name: value for name, value in dataclasses.asdict(comparison).items() if name != "reasons"}


def assert_same_fields(
    comparison: LossComparison, expected: LossComparison, *names: str, rel: float = 1e-9
) -> None:
    for name in names or numeric_fields(comparison):
        value, expected_value = getattr(comparison, name), getattr(expected, name)
        assert (value is None) == (expected_value is None), name
        assert expected_value is None or value == pytest.approx(expected_value, rel=rel, abs=1e-12), name
