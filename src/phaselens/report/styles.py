"""Styles of the terminal, in the notation of rich."""

from __future__ import annotations

# Okabe and Ito's orange, distinct from plain text for all common kinds of colour vision; the mark repeats it.
MARKED = "bold #E69F00"
#: Style of a printed cell by its role.
STYLES = {"value": "", "marked": MARKED, "null": "dim"}
