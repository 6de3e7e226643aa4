"""Numbers that a parameter lists, separated by commas."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from phaselens.plugin import InputError


def parse_numbers(
    entries: Iterable[str],
    accepts: Callable[[float], bool],
    message: str,
    read: Callable[[str], float] = float,
) -> list[float]:
    """Return the numbers of `entries`, each once, in their order.

    `accepts` is asked about every number, and about NaN for an entry that `read` cannot read.

    Raises:
        InputError: with `message`, in which `{entry!r}` stands for the entry, if a number is not accepted.

    >>> parse_numbers("0.5, 1, .5".split(","), lambda share: 0 <= share <= 1, "{entry!r} is not a share")
    [0.5, 1.0]
    """
    numbers = []
    for entry in entries:
        try:
            number = read(entry.strip())
        except ValueError:
            number = math.nan
        if not accepts(number):
            raise InputError(message.format(entry=entry.strip()))
        numbers.append(number)
    return list(dict.fromkeys(numbers))
