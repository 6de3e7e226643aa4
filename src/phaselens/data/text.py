"""A text of a run, and the fields of a record that hold it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

from phaselens.errors import InputError, require_flag, require_text, require_unicode, short_form


@dataclass(frozen=True)
class Text:
    """A text, its id in result tables, and an optional label that groups texts."""

    id: str
    text: str
    label: str | None = None

    def __post_init__(self) -> None:
        for name in ("id", "text"):
            if not isinstance(getattr(self, name), str):
                raise InputError(
                    f"expected {name} of a Text as a str, received {short_form(getattr(self, name))}"
                )
            require_unicode(f"{name} of a Text", getattr(self, name))
        if self.label is not None:
            require_text("label of a Text", self.label)
            require_unicode("label of a Text", self.label)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the whole text in UTF-8, before any truncation."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True)
class TextFields:
    """Where the texts of a file stand.

    Attributes:
        text, id, label: fields of a record (.jsonl, .csv, .tsv, .parquet). A record without an id is numbered. Labels
            are not read unless their field is named.
        paragraphs: a text of a .txt file ends at a blank line instead of at the end of its line.
    """

    text: str = "text"
    id: str = "id"
    label: str | None = None
    paragraphs: bool = False

    def __post_init__(self) -> None:
        for name in ("text", "id"):
            require_text(f"{name} field", getattr(self, name))
        if self.label is not None:
            require_text("label field", self.label)
        require_flag("paragraphs", self.paragraphs)

    @property
    def columns(self) -> list[str]:
        """The named fields, each once."""
        return list(dict.fromkeys([self.text, self.id, *([self.label] if self.label is not None else [])]))
