"""Fills the tables of docs/causality.md with the numbers that its commands measure.

    python tools/measured_page.py            run the commands and rewrite the page's numbers
    python tools/measured_page.py --check    exit with 1 if a number differs from what its command measures

A block that begins with ```sh run holds commands. A table below it that follows a comment such as
`<!-- bos-mlp.conditions[condition=each layer]: ratio ci_low; sinks.layers: sink_rate -->` holds their numbers. The
columns before those named there (`model`, `condition`, `layer`, …) select the row. Each cell keeps its number of
decimals.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phaselens.cli.entry import run_to_exit_code

PAGE = Path(__file__).parents[1] / "docs" / "causality.md"
MISSING = "–"
_BLOCK = re.compile(
    r"^```sh run\n(?P<commands>.*?)^```$|^<!-- (?P<sources>[\w-]+\.\w+[^\n]*) -->\n\n(?P<table>(?:\|[^\n]*\n)+)",
    re.DOTALL | re.MULTILINE,
)
_SOURCE = re.compile(
    r"(?P<metric>[\w-]+)\.(?P<table>\w+)(?:\[(?P<column>\w+)=(?P<value>[^\]]+)\])?: (?P<names>[\w ]+)"
)


@dataclass(frozen=True)
class PageCell:
    """One number on the page: its offset, the written text, and the measured number."""

    offset: int
    written: str
    measured: float | None

    @property
    def corrected(self) -> str:
        """The measured number, with the decimals of the written one."""
        if self.measured is None:
            return MISSING
        decimals = len(self.written.partition(".")[2])
        return f"{self.measured:,.{decimals}f}".replace("-", "−")

    @property
    def agrees(self) -> bool:
        """Whether both numbers differ by at most one in the last place, which may be another machine's rounding."""
        if self.measured is None or self.written == MISSING:
            return self.written == self.corrected
        decimals = len(self.written.partition(".")[2])
        return abs(number(self.written) - round(self.measured, decimals)) < 1.5 * 10**-decimals


def number(written: str) -> float:
    """Return the number that a text such as `−1,234.5` stands for."""
    return float(written.replace("−", "-").replace(",", ""))


def measure(command: str, folder: Path) -> dict[str, Any]:
    """Return the run of one command, parsed from `--format json`. Its figures go into `folder`."""
    program, *arguments = shlex.split(command)
    if program != "phaselens":
        raise ValueError(f"the page runs {program!r}; only phaselens commands are measured")
    if "--figures" in arguments:
        arguments[arguments.index("--figures") + 1] = str(folder)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = run_to_exit_code([*arguments, "--format", "json", "--quiet"])
    if code:
        raise ValueError(f"{command!r} ended with code {code}")
    result: dict[str, Any] = json.loads(out.getvalue())
    return result


def page_cells(page: str, folder: Path) -> Iterator[PageCell]:
    """Yield all numbers of the page's measured tables, from top to bottom."""
    metrics: dict[str, Any] = {}
    for block in _BLOCK.finditer(page):
        if block["commands"] is not None:
            for command in block["commands"].replace("\\\n", " ").splitlines():
                metrics |= measure(command, folder)["metrics"]
        else:
            yield from _cells_of_table(block, metrics)


def _cells_of_table(block: re.Match[str], metrics: Mapping[str, Any]) -> Iterator[PageCell]:
    sources = [match for match in map(_SOURCE.fullmatch, block["sources"].split("; ")) if match]
    if len(sources) != len(block["sources"].split("; ")):
        raise ValueError(f"cannot read the sources {block['sources']!r}")
    start = block.start("table")
    header, rule, *lines = block["table"].splitlines(keepends=True)
    titles = [text for _, text in _split(header)]
    names = [(source, name) for source in sources for name in source["names"].split()]
    n_keys = len(titles) - len(names)
    start += len(header) + len(rule)
    for line in lines:
        line_cells = _split(line)
        keys = dict(zip(titles, [text for _, text in line_cells[:n_keys]], strict=False))
        for (source, name), (offset, written) in zip(names, line_cells[n_keys:], strict=True):
            yield PageCell(start + offset, written, _look_up(metrics, source, keys, name))
        start += len(line)


def _split(line: str) -> list[tuple[int, str]]:
    """Return the cells of a table's line, each with its offset."""
    return [(match.start(1), match[1].strip("`")) for match in re.finditer(r"(?<=\| )(.*?)(?= \|)", line)]


def _look_up(
    metrics: Mapping[str, Any], source: re.Match[str], keys: Mapping[str, str], name: str
) -> float | None:
    table = metrics[source["metric"]]["tables"][source["table"]]
    columns = [column["name"] for column in table["columns"]]
    rows = [dict(zip(columns, row, strict=True)) for row in table["rows"]]
    required = {key: value for key, value in keys.items() if key in columns}
    if source["column"]:
        required[source["column"]] = source["value"]
    matches = [row for row in rows if all(_same(row[key], value) for key, value in required.items())]
    if len(matches) != 1:
        raise ValueError(f"{source[0]}: {len(matches)} rows have {required}; expected exactly one")
    value: float | None = matches[0][name]
    return value


def _same(cell: object, written: str) -> bool:
    return written == (MISSING if cell is None else str(cell))


def with_measured_numbers(page: str, measured_cells: Sequence[PageCell]) -> str:
    """Return `page` with every number replaced by the measured one."""
    for cell in reversed(measured_cells):
        page = page[: cell.offset] + cell.corrected + page[cell.offset + len(cell.written) :]
    return page


def main() -> int:
    """Rewrite the page, or check it."""
    parser = argparse.ArgumentParser(description="Measured numbers of docs/causality.md")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--figures", type=Path, help="a folder for the figures that the commands draw")
    options = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as scratch:
        cells = list(page_cells(page, options.figures or Path(scratch)))
    if options.check:
        wrong_cells = [cell for cell in cells if not cell.agrees]
        for cell in wrong_cells:
            print(f"{cell.written} on the page, {cell.corrected} measured")
        return int(bool(wrong_cells))
    PAGE.write_text(with_measured_numbers(page, cells), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
