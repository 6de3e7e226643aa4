"""Write the generated part of docs/testing.md: branch coverage by package and its worst modules, after `make coverage`.

python -m tools.coverage_page [REPORT]    by default build/coverage/report.json
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.generated_blocks import with_block

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "testing.md"
REPORT = ROOT / "build" / "coverage" / "report.json"
#: Modules below this are listed, in percent.
LOW = 90.0


@dataclass(frozen=True)
class Coverage:
    """Numbers of lines and branches, and how many of them ran."""

    n_lines: int = 0
    n_covered_lines: int = 0
    n_branches: int = 0
    n_covered_branches: int = 0

    @classmethod
    def of(cls, summary: Mapping[str, int]) -> Coverage:
        """Read the summary of a file in coverage.py's JSON report."""
        names = ("num_statements", "covered_lines", "num_branches", "covered_branches")
        return cls(*(summary[name] for name in names))

    def __add__(self, other: Coverage) -> Coverage:
        return Coverage(
            self.n_lines + other.n_lines,
            self.n_covered_lines + other.n_covered_lines,
            self.n_branches + other.n_branches,
            self.n_covered_branches + other.n_covered_branches,
        )

    @property
    def percent(self) -> float:
        """Lines and branches that ran, in percent, as coverage.py adds them."""
        return _percent(self.n_covered_lines + self.n_covered_branches, self.n_lines + self.n_branches)

    @property
    def percent_of_lines(self) -> float:
        """Lines that ran, in percent."""
        return _percent(self.n_covered_lines, self.n_lines)

    @property
    def percent_of_branches(self) -> float:
        """Branches that were taken, in percent."""
        return _percent(self.n_covered_branches, self.n_branches)


def _percent(n_covered: int, n: int) -> float:
    return 100 * n_covered / n if n else 100.0


def by_module(report: Mapping[str, Any]) -> dict[str, Coverage]:
    """Return the coverage of each module, by its path from the repository's root."""
    return {
        re.sub(r"^.*?(?=src/|plugins/)", "", path, count=1): Coverage.of(file["summary"])
        for path, file in report["files"].items()
    }


def package_of(path: str) -> str:
    """Return the package of a module, as `phaselens.lens`."""
    parts = Path(path).parts[1:-1]
    return ".".join(parts[:2])


def total(modules: Iterable[Coverage]) -> Coverage:
    """Return the sum of modules."""
    return sum(modules, Coverage())


def tables(report: Mapping[str, Any]) -> str:
    """Return the tables by package and of the lowest modules, as Markdown."""
    modules = by_module(report)
    packages: dict[str, list[Coverage]] = defaultdict(list)
    for path, coverage in modules.items():
        packages[package_of(path)].append(coverage)
    lines = _header("package")
    for name in sorted(packages):
        lines.append(_row(f"`{name}`", total(packages[name])))
    lines += [_row("all", total(modules.values())), "", f"Modules below {LOW:g} %, the lowest first:", ""]
    lines += _header("module")
    low = [path for path in modules if modules[path].percent < LOW]
    lines += [
        _row(f"`{path}`", modules[path]) for path in sorted(low, key=lambda path: modules[path].percent)
    ]
    return "\n".join(lines) + "\n"


def _header(what: str) -> list[str]:
    return [f"| {what} | lines | that ran | branches | that were taken | both |", "|---|---|---|---|---|---|"]


def _row(name: str, coverage: Coverage) -> str:
    shares = [coverage.percent_of_lines, coverage.percent_of_branches, coverage.percent]
    lines, branches, total_share = (f"{share:.1f} %" for share in shares)
    return (
        f"| {name} | {coverage.n_lines:,} | {lines} | {coverage.n_branches:,} | {branches} | {total_share} |"
    )


def with_tables(page: str, report: Mapping[str, Any]) -> str:
    """Return `page` with the tables of a report."""
    return with_block(page, "coverage", tables(report), "docs/testing.md")


def main() -> int:
    """Rewrite the page."""
    report_file = Path(sys.argv[1]) if len(sys.argv) > 1 else REPORT
    report = json.loads(report_file.read_text(encoding="utf-8"))
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), report), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
