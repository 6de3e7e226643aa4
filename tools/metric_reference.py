"""Writes the generated parts of docs/metrics.md: every metric's parameters, tables and columns, from its class.

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
    """Definition by default, parameters, tables and columns of one metric, as Markdown."""
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
            lines.append(f"| `{column.name}` | {column.unit or ''} | {_cell(column.help)} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def rewritten(page: str) -> str:
    """`page` with each generated part made anew. ValueError where a built-in metric has no place on it."""
    for each in plugins().registered:
        if each.distribution != "phaselens":
            continue
        begin, end = BEGIN.format(each.name), END.format(each.name)
        pattern = re.compile(re.escape(begin) + r".*?" + re.escape(end), re.DOTALL)
        if len(pattern.findall(page)) != 1:
            raise ValueError(f"docs/metrics.md needs one `{begin}` … `{end}`")
        block = f"{begin}\n{reference(plugins().metric(each.name))}\n{end}"
        page = pattern.sub(lambda _, block=block: block, page)
    return page


def main() -> int:
    """Rewrite the page, or check it."""
    parser = argparse.ArgumentParser(description="Generated parts of docs/metrics.md")
    parser.add_argument("--check", action="store_true")
    before = PAGE.read_text(encoding="utf-8")
    after = rewritten(before)
    if parser.parse_args().check:
        return int(before != after)
    PAGE.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
