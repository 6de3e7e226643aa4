"""Write what the pages of metrics take from the classes: parameters, columns, and the list of all metrics.

    python -m tools.metric_reference            rewrite docs/metrics.md, docs/metrics/*.md and docs/metrics/columns.md
    python -m tools.metric_reference --check    exit with 1 if one of them is out of date

A page's part between `<!-- generated: NAME -->` and `<!-- end of NAME -->` is generated; the whole of
docs/metrics/columns.md is.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from phaselens.plugin import Metric, kind_of, plugins

INDEX = Path(__file__).parents[1] / "docs" / "metrics.md"
FOLDER = INDEX.with_suffix("")
COLUMNS = FOLDER / "columns.md"
BEGIN, END = "<!-- generated: {} -->", "<!-- end of {} -->"
#: Kinds of metrics in the order of the list, with what their section says.
KINDS = {
    "observational": ("Metrics that observe", "One forward pass over the texts serves all of them."),
    "causal": (
        "Metrics that intervene",
        "Each edits the model and compares the loss with the unedited model's, text by text.",
    ),
    "task": ("Metrics that ask", "Each runs prompts of its own."),
}


def built_in() -> list[str]:
    """Return the names of the built-in metrics, sorted."""
    return sorted(plugin.name for plugin in plugins().registered if plugin.distribution == "phaselens")


def page_of(name: str) -> Path:
    """Return the page of a metric."""
    return FOLDER / f"{name}.md"


def parameters(metric: type[Metric[Any]]) -> str:
    """Return default definition and parameters of a metric, and the link to its columns, as Markdown."""
    lines = ["## Parameters", "", f"By default: {metric.define(metric.Params())}.", ""]
    if metric.Params.specs():
        lines += ["| parameter | default | takes | what |", "|---|---|---|---|"]
        for spec in metric.Params.specs():
            unit = f" ({spec.unit})" if spec.unit else ""
            lines.append(f"| `{spec.flag}` | {spec.default} | {spec.allowed}{unit} | {_cell(spec.help)} |")
    else:
        lines.append("It has no parameters.")
    tables = ", ".join(f"`{table.name}`" for table in metric.tables)
    lines += ["", f"Result tables: {tables}; [all columns with their units]({COLUMNS.name}#{metric.name})."]
    return "\n".join(lines)


def columns(metric: type[Metric[Any]]) -> str:
    """Return the tables and columns of a metric, as Markdown."""
    lines = [f"## {metric.name}", "", f"What they mean: [{metric.name}]({metric.name}.md).", ""]
    for table in metric.tables:
        lines += [
            f"`{metric.name}.{table.name}`: {table.help}",
            "",
            "| column | unit | what |",
            "|---|---|---|",
            *(
                f"| `{column.name}` | {_cell(column.unit or '')} | {_cell(column.help)} |"
                for column in table.columns
            ),
            "",
        ]
    return "\n".join(lines).rstrip()


def columns_page() -> str:
    """Return the page of all columns."""
    head = (
        "# Columns of all result tables\n\n"
        "Generated from the metrics' classes by `python -m tools.metric_reference`. Every table of a run also has a "
        "column `model` before these.\nMissing values are null, with the reason in the run's notes."
    )
    return "\n\n".join([head, *(columns(plugins().metric(name)) for name in built_in())]) + "\n"


def metric_list() -> str:
    """Return the list of all metrics by kind, with what each measures and a link to its page."""
    measures = {plugin.name: plugin.measures for plugin in plugins().check_all()}
    lines: list[str] = []
    for kind, (title, text) in KINDS.items():
        names = [name for name in built_in() if kind_of(plugins().metric(name)) == kind]
        lines += [f"### {title}", "", text, "", "| metric | measures |", "|---|---|"]
        lines += [f"| [`{name}`]({FOLDER.name}/{name}.md) | {_cell(measures[name])} |" for name in names]
        lines.append("")
    return "\n".join(lines).rstrip()


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def with_part(page: str, name: str, text: str) -> str:
    """Return `page` with its generated part rewritten.

    Raises:
        ValueError: if the page does not have exactly one such part.
    """
    begin, end = BEGIN.format(name), END.format(name)
    pattern = re.compile(re.escape(begin) + r".*?" + re.escape(end), re.DOTALL)
    if len(pattern.findall(page)) != 1:
        raise ValueError(f"the page needs one `{begin}` … `{end}`")
    return pattern.sub(lambda _: f"{begin}\n\n{text}\n\n{end}", page)


def current_pages() -> dict[Path, str]:
    """Return the text that each page should have.

    Raises:
        ValueError: if the page of a built-in metric has no generated part.
        FileNotFoundError: if a built-in metric has no page.
    """
    pages = {
        COLUMNS: columns_page(),
        INDEX: with_part(INDEX.read_text(encoding="utf-8"), "list", metric_list()),
    }
    for name in built_in():
        page = page_of(name).read_text(encoding="utf-8")
        pages[page_of(name)] = with_part(page, name, parameters(plugins().metric(name)))
    return pages


def main() -> int:
    """Rewrite the pages, or check them."""
    parser = argparse.ArgumentParser(description="Generated parts of the pages of metrics")
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    outdated = [
        (path, text)
        for path, text in current_pages().items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    for path, text in outdated:
        print(f"{'out of date' if check else 'written'}: {path.name}")
        if not check:
            path.write_text(text, encoding="utf-8")
    return int(check and bool(outdated))


if __name__ == "__main__":
    sys.exit(main())
