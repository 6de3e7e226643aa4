"""The result of one check of a metric's contract, and the exceptions by which a check ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """The result of one check. `skipped` if the check does not apply to the metric."""

    name: str
    status: Literal["ok", "failed", "skipped"]
    detail: str
    traceback: str = ""


class Broken(AssertionError):  # noqa: N818 - a verdict
    """A check failed; the message says how, in one line."""


class Skipped(Exception):  # noqa: N818 - not an error
    """A check does not apply to the metric; the message says why."""
