"""The command line: it parses, calls and prints. `main` is the console script.

Exit codes: 0 done; 1 a metric failed, or something unforeseen; 2 usage or bad input; 3 a model could not
be loaded or failed its check; 130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave the process with its exit code."""
    from phaselens.cli.outcome import run_to_exit_code

    sys.exit(run_to_exit_code(sys.argv[1:] if arguments is None else arguments))
