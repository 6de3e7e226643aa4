"""The tables of coverage: sums by package, and the lowest modules."""

from __future__ import annotations

import pytest
from tools.coverage_page import Coverage, by_module, package_of, tables, with_tables


def file_report(lines: int, covered: int, branches: int = 0, covered_branches: int = 0) -> dict[str, object]:
    names = ("num_statements", "covered_lines", "num_branches", "covered_branches")
    return {"summary": dict(zip(names, (lines, covered, branches, covered_branches), strict=True))}


REPORT = {
    "files": {
        "src/phaselens/lens/bridge.py": file_report(80, 80, 20, 0),
        "src/phaselens/lens/hooks.py": file_report(100, 100),
        "/elsewhere/plugins/phaselens_plugins/sinks.py": file_report(10, 5),
        "plugins/phaselens_plugins/bos_v.py": file_report(0, 0),
        "src/phaselens/api.py": file_report(0, 0),
    }
}


def test_paths_are_from_the_root_and_packages_are_dotted() -> None:
    plugins = [path for path in by_module(REPORT) if path.startswith("plugins/")]
    assert plugins == ["plugins/phaselens_plugins/sinks.py", "plugins/phaselens_plugins/bos_v.py"]
    assert [package_of(path) for path in by_module(REPORT)] == [
        "phaselens.lens", "phaselens.lens", "phaselens_plugins", "phaselens_plugins", "phaselens",
    ]  # fmt: skip


def test_lines_and_branches_count_alike() -> None:
    part = Coverage(90, 90, 10, 0)
    assert (part.percent, part.percent_of_lines, part.percent_of_branches) == (90.0, 100.0, 0.0)
    assert Coverage().percent == 100.0
    assert (Coverage(1, 1, 2, 2) + Coverage(3, 0)).percent == 50.0


def test_the_tables_have_sums_and_the_lowest_modules_first() -> None:
    text = tables(REPORT)
    assert "| `phaselens.lens` | 180 | 100.0 % | 20 | 0.0 % | 90.0 % |" in text
    assert "| all | 190 | 97.4 % | 20 | 0.0 % | 88.1 % |" in text
    low = text.partition("Modules below 90 %")[2]
    assert low.index("sinks.py` | 10 | 50.0 % | 0 | 100.0 % | 50.0 %") < low.index(
        "bridge.py` | 80 | 100.0 %"
    )
    assert "hooks.py" not in low


def test_the_page_keeps_its_words() -> None:
    page = "before\n<!-- generated: coverage -->\nold\n<!-- end of coverage -->\nafter\n"
    changed = with_tables(page, REPORT)
    assert changed.startswith("before\n<!-- generated: coverage -->\n| package")
    assert changed.endswith("<!-- end of coverage -->\nafter\n")
    with pytest.raises(ValueError, match=r"docs/testing\.md"):
        with_tables("no block", REPORT)
