"""`phaselens.run` and `phaselens.Run`, with runs that can print themselves.

Runs lie below this storey and know nothing of it; importing this module teaches them.
"""

from __future__ import annotations

from phaselens.runs import Run, run

__all__ = ["Run", "run"]


def _as_text(finished: Run) -> str:
    from phaselens.report.tables import as_text

    return as_text(finished)


Run.renderer = _as_text
