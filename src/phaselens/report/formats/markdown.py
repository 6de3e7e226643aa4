"""Markdown for pages and issues."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import IO, TYPE_CHECKING, ClassVar

from phaselens.report.formats.base import RunFormat, TableFormat
from phaselens.report.strings import printable

if TYPE_CHECKING:
    from phaselens.plugin import Table
    from phaselens.report.document import MetricSection
    from phaselens.report.table import DisplayTable
    from phaselens.runs import Run


class MarkdownFormat(RunFormat, TableFormat):
    """Markdown of the terminal's tables, in GitHub's dialect."""

    help: ClassVar[str] = "for pages"

    def write_run(self, run: Run, file: IO[str]) -> None:
        from phaselens.report.document import run_document

        document = run_document(run)
        lines = [line for section in document.sections for line in _section(section)]
        if document.bos:
            lines += [escaped(document.bos), ""]
        lines += [f"- {escaped(warning)}" for warning in document.warnings]
        file.write("\n".join(lines).rstrip() + "\n")

    def write_table(self, name: str, table: Table, file: IO[str]) -> None:
        from phaselens.report.builders import result_table

        file.writelines(f"{line}\n" for line in _grid(result_table(name, table)))


def _section(section: MetricSection) -> Iterator[str]:
    yield from (f"### {section.name}: {escaped(section.title)}", "", escaped(section.definition), "")
    for table in section.tables:
        yield from table_lines(table)
    for failure in section.failures:
        yield f"failed: {escaped(failure)}"


def table_lines(table: DisplayTable) -> Iterator[str]:
    """Yield a table with its name, caption and notes."""
    if table.name:
        yield from (f"`{table.name}`", "")
    if table.caption:
        yield from (escaped(table.caption), "")
    yield from (*_grid(table), "")
    for note in table.notes:
        yield from (escaped(note), "")


def _grid(table: DisplayTable) -> Iterator[str]:
    """Yield headings, a rule and the rows; the models' columns are side by side, headed by the model's label."""
    titles = table.titles()
    names = [table.row_title] if table.row_title is not None else []
    if not table.is_list:
        titles = [f"{label} {title}".lstrip() for label in table.models for title in titles]
    headings = [*names, *titles]
    yield _line(headings)
    yield "| " + " | ".join(["---", *(["---:"] * (len(headings) - 1))]) + " |"
    for row in table.rows:
        cells = [cell.text for group in row.cells for cell in table.printed(group)]
        yield _line([*([row.name] if names else []), *cells])


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(map(escaped, cells)) + " |"


def escaped(text: str) -> str:
    """Return `text` on one line, with the characters escaped that Markdown or HTML would interpret."""
    text = printable(text).replace("&", "&amp;").replace("<", "&lt;").replace("\\", "\\\\")
    for character in "|*_`[]":
        text = text.replace(character, "\\" + character)
    return text
