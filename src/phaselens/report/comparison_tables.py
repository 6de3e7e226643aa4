"""Comparisons as display tables: for each metric the displayed value by layer or condition, with its difference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.text import Text

from phaselens.report.label_tables import label_name, row_name
from phaselens.report.numbers import NumberFormat
from phaselens.report.strings import printable
from phaselens.report.table import DisplayColumn, DisplayRow, DisplayTable, Record, mark_notes
from phaselens.report.terminal_layout import WIDTH, plain_text, print_table
from phaselens.runs import Comparison

_MARK_MEANS = "the interval of the difference excludes 0"


def comparison_tables(comparison: Comparison) -> Iterator[DisplayTable]:
    """Yield a table for each metric, with the values of both models and their difference in the displayed column."""
    records = comparison.differences.records()
    for metric, value in comparison.displayed.items():
        displayed_records = [
            record for record in records if record["metric"] == metric and record["value"] == value
        ]
        other_values = {str(record["value"]) for record in records if record["metric"] == metric} - {value}
        unit = displayed_records[0]["unit"]
        caption = f"{metric}: {value}{f', {unit}' if unit else ''}; mean over texts"
        if other_values:
            noun = "value" if len(other_values) == 1 else "values"
            caption += f"; {len(other_values)} more {noun} with --format json or csv"
        for label in dict.fromkeys(record["label"] for record in displayed_records):
            of_label = "" if not comparison.is_grouped else f"; {label_name(label)}"
            members = [record for record in displayed_records if record["label"] == label]
            yield _table(comparison, members, printable(caption + of_label))


def _table(comparison: Comparison, records: Sequence[Record], caption: str) -> DisplayTable:
    exact = NumberFormat("compact", 4, 0.0)
    first, second = map(printable, comparison.titles)
    columns = [
        DisplayColumn("first", first, exact),
        DisplayColumn("second", second, exact),
        DisplayColumn("difference", "difference", exact, low="ci_low", high="ci_high", is_main=True),
        DisplayColumn("p_holm", "p", NumberFormat("p_value")),
        DisplayColumn("d_z", "d_z", NumberFormat(digits=2)),
        DisplayColumn("n_texts", "texts"),
    ]
    rows = [
        DisplayRow(
            row_name(record["condition"], record["group"], record["layer"]),
            [[c.cell(record, is_marked=bool(record["excludes_zero"])) for c in columns]],
        )
        for record in records
    ]
    by_condition = any(record["condition"] is not None for record in records)
    title = (
        "condition" if by_condition else "group" if any(record["group"] for record in records) else "layer"
    )
    labels = [f"{second} − {first}"]
    return DisplayTable(
        columns,
        rows,
        "conditions" if by_condition else "layers",
        labels,
        title,
        caption=caption,
        notes=mark_notes(rows, _MARK_MEANS),
    )


def comparison_notes(comparison: Comparison) -> list[str]:
    """Return the number of tests, then what a reader needs to know, and what was allowed to differ."""
    n_differences = comparison.n_differences
    tested = "1 difference was" if n_differences == 1 else f"{n_differences:,} differences were"
    return [
        f"{tested} tested by sign flips of texts; p is adjusted for the rows of its table (Holm)",
        *(f"note: {printable(note)}" for note in comparison.notes),
        *(
            f"note: compared although they differ: {printable(difference)}"
            for difference in comparison.allowed
        ),
    ]


def print_comparison(comparison: Comparison, output: Console) -> None:
    """Print the tables, the number of differences that were tested, and the notes."""
    for table in comparison_tables(comparison):
        print_table(table, output)
    tested, *notes = comparison_notes(comparison)
    output.print(Text(tested))
    for note in notes:
        output.print(Text(note, style="dim"))


def as_text(comparison: Comparison) -> str:
    """Return the comparison as plain text, 100 columns wide."""
    return plain_text(lambda output: print_comparison(comparison, output), WIDTH)
