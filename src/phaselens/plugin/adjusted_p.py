"""Columns of p-values that are adjusted for the number of rows that have one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from phaselens.errors import is_list_like, require_whole
from phaselens.plugin.author_errors import author_error, describe_value
from phaselens.plugin.tables import Column

_FAMILY = "p_value adjusted for the number of rows of the model that have one"
#: The two columns that `with_adjusted_p` fills.
ADJUSTED_P = (
    Column("p_holm", float, "probability", f"{_FAMILY}, by Holm's method"),
    Column("p_bh", float, "probability", f"{_FAMILY}, by Benjamini and Hochberg's method"),
)


def with_adjusted_p(rows: Iterable[Sequence[Any]], index: int) -> list[tuple[Any, ...]]:
    """Return rows with two more cells each: cell `index`, a p-value, adjusted for the number of rows that have one.

    The cells are those of the columns `ADJUSTED_P`; they are missing where p is.

    Args:
        rows: the rows of one model, a family of tests.
        index: the index of the p-value in a row.

    Raises:
        TypeError: for rows that are not a list.

    >>> with_adjusted_p([("a", 0.01), ("b", 0.04), ("c", None)], 1)
    [('a', 0.01, 0.02, 0.02), ('b', 0.04, 0.04, 0.04), ('c', None, None, None)]
    """
    from phaselens.uncertainty import adjust_p_values

    require_whole("index", index, 0)
    if not is_list_like(rows):
        raise author_error(
            f"with_adjusted_p: rows are {describe_value(rows)}; give a list of rows, each a tuple of cells"
        )
    table = [tuple(row) for row in rows]
    p_values = [row[index] for row in table]
    holm, benjamini_hochberg = (
        adjust_p_values(p_values, method=method) for method in ("holm", "benjamini-hochberg")
    )
    return [
        (*row, *adjusted)
        for row, adjusted in zip(table, zip(holm, benjamini_hochberg, strict=True), strict=True)
    ]
