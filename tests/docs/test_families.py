"""docs/families.md names every family that the tests serve."""

from __future__ import annotations

from pathlib import Path

import pytest

from phaselens.testing import FAMILIES, tiny_model

PAGE = (Path(__file__).parents[2] / "docs" / "families.md").read_text()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_served_family_is_listed(family):
    assert f"`{type(tiny_model(family)).__name__}`" in PAGE


def test_every_drope_variant_is_listed():
    from phaselens.lens.drope import ATTENTION_TYPES

    assert all(f"`{attention_type}`" in PAGE for attention_type in ATTENTION_TYPES)
