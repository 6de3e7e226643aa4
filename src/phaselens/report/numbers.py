"""Numbers of very different size in one column, each in a few characters that still say what matters."""

from __future__ import annotations

from phaselens.plugin import Cell, Column
from phaselens.report import words

_LARGE = 99_999.5


def null_of(column: Column) -> float | None:
    """The value of such a column where nothing happens: ratios have 1, differences in nats 0, others none."""
    if column.unit == "ratio":
        return 1.0
    return 0.0 if (column.unit or "").startswith("nats") else None


def compact(value: Cell, null: float | None = None, *, digits: int = 3) -> str:
    """A number in about five characters. What is near `null` and not equal to it is never shown as if it were.

    >>> [compact(value) for value in (54.2309, 1815.2, 1e6, None)]
    ['54.2', '1,815', '1.0e6', '–']
    >>> [compact(value, 1.0) for value in (1.0, 1.0003, 1.1488)], compact(-0.00004, 0.0)
    (['1', '1.0003', '1.149'], '-4e-5')
    """
    if not isinstance(value, float):
        return words.number(value)
    if value == null:
        return f"{value:g}"
    size = abs(value)
    if size >= _LARGE:
        return _exponent(f"{value:.1e}")
    decimals = 0 if size >= 99.95 else 1 if size >= 9.995 else digits
    if null is None:
        return f"{value:,.{decimals}f}"
    for more in range(decimals, max(decimals, 4) + 1):
        shown = f"{value:,.{more}f}"
        if float(shown.replace(",", "")) != null:
            return shown
    return shown if null else _exponent(f"{value:.0e}")


def _exponent(shown: str) -> str:
    """`1.0e+06` as `1.0e6`."""
    mantissa, _, exponent = shown.partition("e")
    return f"{mantissa}e{int(exponent)}"


def interval(low: Cell, high: Cell, null: float | None = None, *, digits: int = 3) -> str:
    """Both ends, with a dash between them, or with dots where one is negative.

    >>> interval(1.1116, 1.1887, 1.0), interval(-0.0124, 0.0124, 0.0), interval(None, None)
    ('1.112–1.189', '-0.012…0.012', '–')
    """
    if not isinstance(low, int | float) or not isinstance(high, int | float):
        return words.MISSING
    between = "…" if low < 0 else "–"
    return f"{compact(low, null, digits=digits)}{between}{compact(high, null, digits=digits)}"


def p_value(value: Cell) -> str:
    """To three decimals, without the 0 that all have; never 0, and 1 only where it is.

    >>> [p_value(value) for value in (0.00024, 0.03125, 0.9999, 1.0, None)]
    ['<.001', '.031', '>.999', '1', '–']
    """
    if not isinstance(value, int | float):
        return words.MISSING
    if value < 0.001:
        return "<.001"
    if 0.999 < value < 1:
        return ">.999"
    return f"{value:.3f}".removeprefix("0") if value < 1 else "1"
