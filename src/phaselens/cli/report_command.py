"""The command `phaselens report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from phaselens.cli import shared_options
from phaselens.cli.streams import print_message
from phaselens.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phaselens.runs import Run

#: The report's name in a run directory.
REPORT = "report.html"


@click.command()
@click.argument("directory", metavar="DIR")
@click.argument("file", required=False, metavar="[FILE.html]")
@click.option("--quiet", is_flag=True, help="Print nothing on stderr.")
@shared_options.debug
def report(directory: str, file: str | None, quiet: bool, debug: bool) -> int:
    """Write the run in DIR as one HTML file, by default DIR/report.html.

    The file has tables, figures, heatmaps by head, texts by token, comparisons and provenance, and loads nothing from
    the network. It replaces an earlier report. It needs the extra `report`.
    """
    from phaselens.runs import open_run

    target = report_target(file or str(Path(directory) / REPORT))
    run = open_run(directory)
    if target is not None:
        write_report(run, target, command=None, quiet=quiet)
    return 0


def report_target(file: str | None) -> Path | None:
    """Return where a report is written, checked before anything is measured; None without a file.

    Raises:
        InputError: for a name without the ending .html, a folder, or where Jinja2 is not installed.
    """
    if file is None:
        return None
    path = Path(file)
    if path.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"the report {file!r} does not end in .html; it is one HTML file")
    if path.is_dir():
        raise InputError(f"the report {file!r} is a folder; name a file")
    from phaselens.report.html import require_jinja

    require_jinja()
    return path


def write_report(run: Run, path: Path, *, command: Sequence[str] | None, quiet: bool) -> None:
    """Write the report, and say where it is."""
    from phaselens.report.html import write_html_report

    write_html_report(run, path, command=command)
    if not quiet:
        print_message("note", f"the report is {path} ({path.stat().st_size / 1e6:.1f} MB)")
