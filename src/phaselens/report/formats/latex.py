"""LaTeX tables for papers, with the rules of the package booktabs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import IO, TYPE_CHECKING, ClassVar

from phaselens.report.formats.base import RunFormat, TableFormat
from phaselens.report.strings import printable

if TYPE_CHECKING:
    from phaselens.plugin import Table
    from phaselens.report.document import MetricSection
    from phaselens.report.table import DisplayTable
    from phaselens.runs import Run

#: Characters that LaTeX interprets, or that its usual fonts lack.
_COMMANDS = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "●": r"$\bullet$", "└": r"\quad ", "–": "--", "—": "---", "−": "$-$", "…": r"\dots{}",
    "‖": r"$\|$", "×": r"$\times$", "·": r"$\cdot$", "≥": r"$\geq$", "≤": r"$\leq$", "≠": r"$\neq$", "±": r"$\pm$",
    "→": r"$\to$", "Σ": r"$\Sigma$", "Δ": r"$\Delta$", "⟨": r"$\langle$", "⟩": r"$\rangle$", "ᵀ": r"$^\top$",
    "²": "$^2$",
    **{subscript: f"$_{digit}$" for digit, subscript in enumerate("₀₁₂₃₄₅₆₇₈₉")},
}  # fmt: skip


class LatexFormat(RunFormat, TableFormat):
    """LaTeX of the terminal's tables, one `table` environment each; needs the package booktabs."""

    help: ClassVar[str] = "for papers (booktabs)"

    def write_run(self, run: Run, file: IO[str]) -> None:
        from phaselens.report.document import run_document

        document = run_document(run)
        lines = [line for section in document.sections for line in _section(section)]
        # Comments, so that the output can be included as it is.
        notes = [document.bos, *document.warnings] if document.bos else document.warnings
        lines += [f"% {printable(note)}" for note in notes]
        file.write("\n".join(lines).rstrip() + "\n")

    def write_table(self, name: str, table: Table, file: IO[str]) -> None:
        from phaselens.report.builders import result_table

        file.writelines(f"{line}\n" for line in _environment(result_table(name, table), name, name))


def _section(section: MetricSection) -> Iterator[str]:
    yield f"% {section.name}: {printable(section.title)}"
    for number, table in enumerate(section.tables):
        about = table.name or f"{section.title}: {section.definition}"
        caption = "; ".join(
            filter(None, [about if number == 0 or table.name else section.title, table.caption])
        )
        yield from _environment(table, caption, f"{section.name}-{number + 1}")
        yield ""
    for failure in section.failures:
        yield f"% failed: {printable(failure)}"


def _environment(table: DisplayTable, caption: str, label: str) -> Iterator[str]:
    yield from (
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escaped('. '.join([caption, *table.notes]))}}}",
    )
    yield rf"\label{{tab:{re.sub('[^A-Za-z0-9.:-]', '-', label)}}}"
    yield from _tabular(table)
    yield r"\end{table}"


def _tabular(table: DisplayTable) -> Iterator[str]:
    """Yield the table with the models' labels above their columns."""
    titles = table.titles()
    names = [table.row_title] if table.row_title is not None else []
    n_models = 1 if table.is_list else len(table.models)
    has_left_text = not names
    columns = (
        "l" * len(names) + ("l" if has_left_text else "") + "r" * (n_models * len(titles) - has_left_text)
    )
    yield rf"\begin{{tabular}}{{{columns}}}"
    yield r"\toprule"
    if not table.is_list:
        labels = [rf"\multicolumn{{{len(titles)}}}{{c}}{{{escaped(label)}}}" for label in table.models]
        yield _line([*[""] * len(names), *labels])
        first = len(names) + 1
        starts = [first + model * len(titles) for model in range(n_models)]
        yield " ".join(rf"\cmidrule(lr){{{start}-{start + len(titles) - 1}}}" for start in starts)
    yield _line(map(escaped, [*names, *titles * n_models]))
    yield r"\midrule"
    for row in table.rows:
        cells = [cell.text for group in row.cells for cell in table.printed(group)]
        yield _line(map(escaped, [*([row.name] if names else []), *cells]))
    yield r"\bottomrule"
    yield r"\end{tabular}"


def _line(cells: Sequence[str] | Iterator[str]) -> str:
    return " & ".join(cells) + r" \\"


def escaped(text: str) -> str:
    r"""Return `text` on one line, with every character that LaTeX would interpret or lack as a command.

    >>> escaped("100 % of a_b ≥ 0.3")
    '100 \\% of a\\_b $\\geq$ 0.3'
    """
    return "".join(_COMMANDS.get(character, character) for character in printable(text))
