"""Print the sizes of all traps, or write or check the tables of docs/traps.md."""

from __future__ import annotations

import argparse
import sys

from tools.traps.page import (
    HEADER,
    PAGE,
    TRAPS,
    default_models,
    disagreements,
    measured_rows,
    table,
    with_rows,
)


def main() -> int:
    """Print, write or check."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.traps", description="Sizes of the traps on a model"
    )
    parser.add_argument("models", nargs="*", help="rope, drope, smollm2; default: those that are installed")
    parser.add_argument("--trap", action="append", help="a trap, by its heading on the page; default: all")
    parser.add_argument("--write", action="store_true", help="rewrite the tables of docs/traps.md")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a number on the page differs")
    options = parser.parse_args()
    traps = [trap for trap in TRAPS if not options.trap or trap.name in options.trap]
    if not traps:
        parser.error(f"no trap {options.trap!r}; use one of the headings of docs/traps.md")
    rows = measured_rows(options.models or default_models(), traps)
    page = PAGE.read_text(encoding="utf-8")
    if options.write:
        PAGE.write_text(with_rows(page, rows), encoding="utf-8")
    elif options.check:
        lines = disagreements(page, rows)
        print("\n".join(lines))
        return int(bool(lines))
    else:
        print(
            table([(name, *line) for name, lines in rows.items() for line in lines], ("trap", *HEADER)),
            end="",
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
