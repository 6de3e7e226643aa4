"""Fills the tables of docs/causality.md with what the commands on the page measure.

    python tools/measured_page.py            run the commands, rewrite the page's numbers
    python tools/measured_page.py --check    exit with 1 if a number is not what its command measures

A block that begins with ```sh run holds commands. A table below it that follows a comment such as
`<!-- bos-mlp.conditions[condition=each layer]: ratio ci_low; sinks.layers: sink_rate -->` holds their numbers: the
columns before those named there (`model`, `condition`, `layer`, …) say which row is meant. Each cell keeps its
number of decimals.
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

from phaselens.cli.outcome import run_to_exit_code

PAGE = Path(__file__).parents[1] / "docs" / "causality.md"
MISSING = "–"
_PART = re.compile(
    r"^```sh run\n(?P<commands>.*?)^```$|^<!-- (?P<sources>[\w-]+\.\w+[^\n]*) -->\n\n(?P<table>(?:\|[^\n]*\n)+)",
    re.DOTALL | re.MULTILINE,
)
_SOURCE = re.compile(
    r"(?P<metric>[\w-]+)\.(?P<table>\w+)(?:\[(?P<column>\w+)=(?P<value>[^\]]+)\])?: (?P<names>[\w ]+)"
)


@dataclass(frozen=True)
class Cell:
    """One number on the page: where it stands, what is written, and what was measured."""

    at: int
    written: str
    measured: float | None

    @property
    def right(self) -> str:
        """The measured number, with the decimals of the written one."""
        if self.measured is None:
            return MISSING
        decimals = len(self.written.partition(".")[2])
        return f"{self.measured:,.{decimals}f}".replace("-", "−")

    @property
    def agrees(self) -> bool:
        """Whether they agree but for one in the last place, which another machine's rounding may change."""
        if self.measured is None or self.written == MISSING:
            return self.written == self.right
        decimals = len(self.written.partition(".")[2])
        return abs(number(self.written) - round(self.measured, decimals)) < 1.5 * 10**-decimals


def number(written: str) -> float:
    """`−1,234.5` as a number."""
    return float(written.replace("−", "-").replace(",", ""))


def measured(command: str, folder: Path) -> dict[str, Any]:
    """The run of one command, as `--format json` prints it. Its figures go into `folder`."""
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
    found: dict[str, Any] = json.loads(out.getvalue())
    return found


def cells(page: str, folder: Path) -> Iterator[Cell]:
    """Every number in the page's measured tables, top to bottom."""
    metrics: dict[str, Any] = {}
    for part in _PART.finditer(page):
        if part["commands"] is not None:
            for command in part["commands"].replace("\\\n", " ").splitlines():
                metrics |= measured(command, folder)["metrics"]
        else:
            yield from _of_table(part, metrics)


def _of_table(part: re.Match[str], metrics: Mapping[str, Any]) -> Iterator[Cell]:
    sources = [match for match in map(_SOURCE.fullmatch, part["sources"].split("; ")) if match]
    if len(sources) != len(part["sources"].split("; ")):
        raise ValueError(f"cannot read the sources {part['sources']!r}")
    start = part.start("table")
    header, _, *lines = part["table"].splitlines(keepends=True)
    titles = [text for _, text in _split(header)]
    names = [(source, name) for source in sources for name in source["names"].split()]
    n_keys = len(titles) - len(names)
    start += len(header) + len(_)
    for line in lines:
        found = _split(line)
        keys = dict(zip(titles, [text for _, text in found[:n_keys]], strict=False))
        for (source, name), (at, written) in zip(names, found[n_keys:], strict=True):
            yield Cell(start + at, written, _look_up(metrics, source, keys, name))
        start += len(line)


def _split(line: str) -> list[tuple[int, str]]:
    """The cells of a line of a table, each with where it begins."""
    return [(match.start(1), match[1].strip("`")) for match in re.finditer(r"(?<=\| )(.*?)(?= \|)", line)]


def _look_up(
    metrics: Mapping[str, Any], source: re.Match[str], keys: Mapping[str, str], name: str
) -> float | None:
    table = metrics[source["metric"]]["tables"][source["table"]]
    columns = [column["name"] for column in table["columns"]]
    rows = [dict(zip(columns, row, strict=True)) for row in table["rows"]]
    wanted = {key: value for key, value in keys.items() if key in columns}
    if source["column"]:
        wanted[source["column"]] = source["value"]
    hits = [row for row in rows if all(_same(row[key], value) for key, value in wanted.items())]
    if len(hits) != 1:
        raise ValueError(f"{source[0]}: {len(hits)} rows have {wanted}; one must be meant")
    value: float | None = hits[0][name]
    return value


def _same(cell: Any, written: str) -> bool:
    return written == (MISSING if cell is None else str(cell))


def rewritten(page: str, found: Sequence[Cell]) -> str:
    """`page` with every measured number in place of what was written."""
    for cell in reversed(found):
        page = page[: cell.at] + cell.right + page[cell.at + len(cell.written) :]
    return page


def main() -> int:
    """Rewrite the page, or check it."""
    parser = argparse.ArgumentParser(description="Measured numbers of docs/causality.md")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--figures", type=Path, help="a folder for the figures that the commands draw")
    options = parser.parse_args()
    before = PAGE.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as scratch:
        found = list(cells(before, options.figures or Path(scratch)))
    if options.check:
        wrong = [cell for cell in found if not cell.agrees]
        for cell in wrong:
            print(f"{cell.written} on the page, {cell.right} measured")
        return int(bool(wrong))
    PAGE.write_text(rewritten(before, found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
