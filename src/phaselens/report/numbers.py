"""Formats of numbers: decimals, percent signs, exponents, and the signs for missing values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from phaselens.plugin import CellValue, Column, Display
from phaselens.report.strings import printable

MISSING = "–"
#: A cell of a heatmap that was not measured.
UNMEASURED = "·"
# Numbers of at least this size have an exponent.
_LARGE = 99_999.5


@dataclass(frozen=True)
class NumberFormat:
    """Format of the numbers of one column.

    | style | writes | for example |
    |---|---|---|
    | `decimal` | `digits` decimals | 0.625 |
    | `percent` | a share in percent | 62.5 % |
    | `compact` | about five characters, distinct from `reference` unless equal to it | 1.0003 |
    | `p_value` | three decimals without the leading 0 | .031 |
    | `layer` | a layer's index | L3 |

    >>> NumberFormat("percent").write(0.625), NumberFormat().write(0.2345678), NumberFormat().write(None)
    ('62.5 %', '0.235', '–')
    """

    style: Literal["decimal", "percent", "compact", "p_value", "layer"] = "decimal"
    digits: int = 3
    reference: float | None = None

    @property
    def factor(self) -> float:
        """The factor by which a figure multiplies the numbers: 100 for shares in percent."""
        return 100.0 if self.style == "percent" else 1.0

    def write(self, value: CellValue) -> str:
        """Format a cell's value; `–` for a missing one."""
        if value is None:
            return MISSING
        if isinstance(value, str):
            return printable(value)
        if self.style == "percent":
            return f"{100 * value:.1f} %"
        if self.style == "p_value":
            return p_value(value)
        if self.style == "layer":
            return f"L{value}"
        if isinstance(value, int):
            return f"{value:,}"
        if self.style == "compact":
            return compact(value, self.reference, digits=self.digits)
        return f"{value:,.{self.digits}f}"

    def write_interval(self, low: CellValue, high: CellValue) -> str:
        """Format the ends of an interval with a dash between them, or `…` if there is a minus sign.

        >>> NumberFormat("percent").write_interval(0.5, 0.75), NumberFormat().write_interval(0.5, None)
        ('50.0–75.0', '–')
        >>> NumberFormat("compact", reference=0.0).write_interval(-0.0124, 0.0124)
        '-0.012…0.012'
        """
        if not isinstance(low, int | float) or not isinstance(high, int | float):
            return MISSING
        if self.style == "percent":
            return f"{100 * low:.1f}–{100 * high:.1f}"
        if self.style == "compact":
            return f"{self.write(low)}{'…' if low < 0 else '–'}{self.write(high)}"
        return f"{low:,.{self.digits}f}–{high:,.{self.digits}f}"


#: Three decimals.
DECIMAL = NumberFormat()


def compact(value: float, reference: float | None = None, *, digits: int = 3) -> str:
    """Format a number in about five characters. A number near `reference` never looks equal to it.

    >>> [compact(value) for value in (54.2309, 1815.2, 1e6)]
    ['54.2', '1,815', '1.0e6']
    >>> [compact(value, 1.0) for value in (1.0, 1.0003, 1.1488)], compact(-0.00004, 0.0)
    (['1', '1.0003', '1.149'], '-4e-5')
    """
    if value == reference:
        return shortest(value)
    size = abs(value)
    if size >= _LARGE:
        return _short_exponent(f"{value:.1e}")
    decimals = 0 if size >= 99.95 else 1 if size >= 9.995 else digits
    if reference is None:
        return f"{value:,.{decimals}f}"
    for n_decimals in range(decimals, max(decimals, 4) + 1):
        text = f"{value:,.{n_decimals}f}"
        if float(text.replace(",", "")) != reference:
            return text
    return text if reference else _short_exponent(f"{value:.0e}")


def _short_exponent(text: str) -> str:
    """Shorten an exponent: `1.0e+06` → `1.0e6`."""
    mantissa, _, exponent = text.partition("e")
    return f"{mantissa}e{int(exponent)}"


def shortest(value: float) -> str:
    """Format a round number, such as a bound or a tick, without trailing zeros.

    >>> shortest(0.05), shortest(1.0)
    ('0.05', '1')
    """
    return f"{value:g}"


def significant(value: float, digits: int) -> str:
    """Format a number with at most this many significant digits.

    >>> significant(0.000123456, 2), significant(3.14159, 4)
    ('0.00012', '3.142')
    """
    return f"{value:.{digits}g}"


def p_value(value: float) -> str:
    """Format a p-value with three decimals and without the leading 0; it is never 0, and 1 only for 1.

    >>> [p_value(value) for value in (0.00024, 0.03125, 0.9999, 1.0)]
    ['<.001', '.031', '>.999', '1']
    """
    if value < 0.001:
        return "<.001"
    if 0.999 < value < 1:
        return ">.999"
    return f"{value:.3f}".removeprefix("0") if value < 1 else "1"


def reference_value(column: Column) -> float | None:
    """Return the value of a condition without an effect: 1 for ratios, 0 for differences in nats, else None."""
    if column.unit == "ratio":
        return 1.0
    return 0.0 if (column.unit or "").startswith("nats") else None


def condition_format(column: Column, display: Display) -> NumberFormat:
    """Return the format of a column of a table of conditions; shares are in percent if the display asks for it."""
    if column.name in ("p_value", "p_holm", "p_bh"):
        return NumberFormat("p_value")
    is_share = (column.unit or "").startswith(("share", "fraction")) or column.name == display.value
    if display.percent and is_share:
        return NumberFormat("percent")
    return NumberFormat("compact", display.digits, reference_value(column))


def layer_format(display: Display) -> NumberFormat:
    """Return the format of all columns of a table by layer."""
    return NumberFormat("percent" if display.percent else "decimal", display.digits)
