"""Tokenizers' names of tokens as readable text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from phaselens.report.strings import printable

_SPACE, _NEWLINE = "Ġ", "Ċ"
_SENTENCEPIECE_SPACE = "▁"


@cache
def _bytes_by_character() -> dict[str, int]:
    """Return the byte that each character stands for in the names of byte-level tokenizers."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in visible}
    hidden = [byte for byte in range(256) if byte not in visible]
    return table | {chr(256 + index): byte for index, byte in enumerate(hidden)}


def readable_tokens(names: Sequence[str]) -> list[str]:
    """Return the text of each token, with control characters escaped and line breaks as ⏎.

    >>> readable_tokens(["<s>", "Ġmy", "int", "Ċ"]), readable_tokens(["▁a", "b"])
    (['<s>', ' my', 'int', '⏎'], [' a', 'b'])
    """
    is_byte_level = any(_SPACE in name or _NEWLINE in name for name in names)
    return [
        _shown(_decoded(name) if is_byte_level else name.replace(_SENTENCEPIECE_SPACE, " ")) for name in names
    ]


def _decoded(name: str) -> str:
    table = _bytes_by_character()
    if not all(character in table for character in name):
        return name
    return bytes(table[character] for character in name).decode("utf-8", errors="replace")


def _shown(text: str) -> str:
    lines = text.replace("\r\n", "⏎").replace("\n", "⏎").replace("\r", "⏎").replace("\t", "⇥")
    return printable(lines)
