"""The command line: parses arguments, calls the library, prints. `phaselens_command` is the console script.

Exit codes: 0 success; 1 a failed metric, or an unforeseen error (a bug); 2 wrong usage or bad input; 3 a model that
could not be loaded or failed its check; 130 interrupted.
"""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Sequence

_COLLECTED_EVERY = (100_000, 50, 100)
"""Thresholds of Python's collection of cycles. By default it looks at every object of all imported libraries again so
often that this takes a sixth of the start of a command."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit the process with its code."""
    gc.set_threshold(*_COLLECTED_EVERY)
    # While it exits, Python looks for cycles among all of them twice more, which takes a quarter of a short command.
    atexit.register(gc.freeze)
    from phaselens.cli.entry import run_to_exit_code

    sys.exit(run_to_exit_code(sys.argv[1:] if arguments is None else arguments))
