"""A metric's warning: text for people, with a code that programs filter by."""

from __future__ import annotations

from phaselens.errors import require_text

#: Code of a warning that intervals are missing because fewer than two texts have a value. `phaselens.patching`, which
#: measures one prompt and shows no interval, leaves out warnings with this code.
TOO_FEW_TEXTS = "too-few-texts"


class MetricWarning(str):
    """A warning's text, with a `code` that names its reason for programs; empty for a warning without one.

    It is compared, printed and written to JSON as its text.

    >>> warning = MetricWarning("1 text: intervals are missing", TOO_FEW_TEXTS)
    >>> warning.prefixed("sinks"), warning.prefixed("sinks").code
    ('sinks: 1 text: intervals are missing', 'too-few-texts')
    """

    __slots__ = ("code",)

    code: str

    def __new__(cls, message: str, code: str | None = None) -> MetricWarning:
        """Create a warning with this text; its code is `code`, or that of `message` if it is itself a MetricWarning."""
        require_text("message", message)
        if code is not None:
            require_text("code", code)
        warning = super().__new__(cls, message)
        warning.code = getattr(message, "code", "") if code is None else code
        return warning

    def prefixed(self, prefix: str) -> MetricWarning:
        """Return the warning with `prefix: ` before its text, and the same code."""
        return MetricWarning(f"{prefix}: {self}", self.code)
