"""Write the generated parts of docs/metrics.md: every metric's parameters, tables and columns, from its class.

python tools/metric_reference.py            rewrite docs/metrics.md
python tools/metric_reference.py --check    exit with 1 if it is out of date
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from phaselens.plugin import Metric, plugins

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"
BEGIN, END = "<!-- generated: {} -->", "<!-- end of {} -->"


def reference(metric: type[Metric[Any]]) -> str:
    """Return default definition, parameters, tables and columns of a metric, as Markdown."""
    default = metric.Params()
    lines = [f"By default: {metric.define(default)}.", "", f"Source: {metric.citation}.", ""]
    if metric.Params.specs():
        lines += ["| parameter | default | takes | what |", "|---|---|---|---|"]
        for spec in metric.Params.specs():
            unit = f" ({spec.unit})" if spec.unit else ""
            lines.append(f"| `{spec.flag}` | {spec.default} | {spec.allowed}{unit} | {_cell(spec.help)} |")
        lines.append("")
    for table in metric.tables:
        lines += [
            f"`{metric.name}.{table.name}`: {table.help}",
            "",
            "| column | unit | what |",
            "|---|---|---|",
        ]
        for column in table.columns:
            lines.append(f"| `{column.name}` | {_cell(column.unit or '')} | {_cell(column.help)} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def with_reference(page: str) -> str:
    """Return `page` with its generated parts rewritten.

    Raises:
        ValueError: if the page has no part for a built-in metric.
    """
    for plugin in plugins().registered:
        if plugin.distribution != "phaselens":
            continue
        begin, end = BEGIN.format(plugin.name), END.format(plugin.name)
        pattern = re.compile(re.escape(begin) + r".*?" + re.escape(end), re.DOTALL)
        if len(pattern.findall(page)) != 1:
            raise ValueError(f"docs/metrics.md needs one `{begin}` … `{end}`")
        block = f"{begin}\n{reference(plugins().metric(plugin.name))}\n{end}"
        page = pattern.sub(lambda _, block=block: block, page)
    return page


def main() -> int:
    """Rewrite the page, or check it."""
    parser = argparse.ArgumentParser(description="Generated parts of docs/metrics.md")
    parser.add_argument("--check", action="store_true")
    stored_page = PAGE.read_text(encoding="utf-8")
    current_page = with_reference(stored_page)
    if parser.parse_args().check:
        return int(stored_page != current_page)
    PAGE.write_text(current_page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
