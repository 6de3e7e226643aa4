"""A griffe extension: the comment `#: …` above a constant is its text in the reference."""

from __future__ import annotations

from typing import Any

import griffe

_MARK = "#:"


class AttributeComments(griffe.Extension):
    """Give constants without a docstring the comment above them."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        """Read the comment above an attribute after the attribute was read."""
        if attr.docstring is not None or attr.lineno is None or not attr.is_public:
            return
        lines = attr.lines_collection[attr.filepath][: attr.lineno - 1]
        comment: list[str] = []
        while lines and lines[-1].strip().startswith(_MARK):
            comment.insert(0, lines.pop().strip().removeprefix(_MARK).strip())
        if comment:
            attr.docstring = griffe.Docstring("\n".join(comment), parent=attr)
