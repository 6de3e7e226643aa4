"""The table of coverage: sums by package, and the modules below the goal."""

from __future__ import annotations

import pytest
from tools.coverage_page import Coverage, by_module, package_of, tables, with_tables


def file_report(lines: int, covered: int, branches: int = 0, covered_branches: int = 0) -> dict[str, object]:
    names = ("num_statements", "covered_lines", "num_branches", "covered_branches")
    return {"summary": dict(zip(names, (lines, covered, branches, covered_branches), strict=True))}


REPORT = {
    "files": {
        "src/phaselens/lens/bridge.py": file_report(90, 90, 10, 0),
        "src/phaselens/lens/hooks.py": file_report(100, 100),
        "/elsewhere/plugins/phaselens_plugins/sinks.py": file_report(10, 5),
        "src/phaselens/api.py": file_report(0, 0),
    }
}


def test_paths_are_from_the_root_and_packages_are_dotted() -> None:
    assert list(by_module(REPORT))[2] == "plugins/phaselens_plugins/sinks.py"
    assert [package_of(path) for path in by_module(REPORT)] == [
        "phaselens.lens", "phaselens.lens", "phaselens_plugins", "phaselens",
    ]  # fmt: skip


def test_lines_and_branches_count_alike() -> None:
    assert Coverage(90, 90, 10, 0).percent == 90.0
    assert Coverage().percent == 100.0
    assert (Coverage(1, 1, 2, 2) + Coverage(3, 0)).percent == 50.0


def test_the_tables_have_sums_and_the_lowest_modules_first() -> None:
    text = tables(REPORT)
    assert "| `phaselens.lens` | 190 | 10 | 95.0 % |" in text
    assert "| all | 200 | 10 | 92.9 % |" in text
    low = text.partition("Modules below 95 %")[2]
    assert low.index("sinks.py` | 10 | 0 | 50.0 %") < low.index("bridge.py` | 90 | 10 | 90.0 %")
    assert "hooks.py" not in low


def test_the_page_keeps_its_words() -> None:
    page = "before\n<!-- generated: coverage -->\nold\n<!-- end of coverage -->\nafter\n"
    changed = with_tables(page, REPORT)
    assert changed.startswith("before\n<!-- generated: coverage -->\n| package")
    assert changed.endswith("<!-- end of coverage -->\nafter\n")
    with pytest.raises(ValueError, match=r"docs/testing\.md"):
        with_tables("no block", REPORT)
