"""The page on hook points has the table of statistics that the registry declares."""

from __future__ import annotations

from tools.page_blocks import ROOT

from phaselens.lens.points import STATISTICS, declaration, in_layer

PAGE = (ROOT / "docs" / "hooks.md").read_text(encoding="utf-8")


def test_the_table_of_statistics_is_the_registry() -> None:
    """Each row has the name, shape and meaning of the registry's entry."""
    declarations = [declaration(f"attn.{statistic}") for statistic in STATISTICS]
    expected = [
        f"| `{in_layer('{i}', entry.name)}` | {entry.shape} | {entry.meaning} |" for entry in declarations
    ]
    assert [line for line in PAGE.splitlines() if line.startswith("| `blocks.")] == expected
