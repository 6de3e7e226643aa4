"""Mutate parts of the package, and see whether tests notice.

    python -m tools.mutation run [TARGET …] [--processes N]     test the mutants that have no verdict yet
    python -m tools.mutation survivors [TARGET …]               print the survivors without a reason
    python -m tools.mutation page [TARGET …]                    write the numbers and the survivors into the pages

mutmut makes the mutants, in copies of the repository under build/mutation. A run that was interrupted continues where
it stopped; after a change of the code, only the functions that changed are tested again.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.mutation.page import write_pages
from tools.mutation.targets import TARGETS, MutationTarget, target_named
from tools.mutation.verdicts import (
    counts,
    forget_survivors,
    read_reasons,
    require_verdicts,
    survivors,
    unused_reasons,
)
from tools.mutation.workspace import FOLDER, MutationError, prepare, require_mutmut, run, workspace_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one action, and return the exit code: 1 with a line on stderr if something is missing or mutmut fails."""
    parser = _parser()
    options = parser.parse_args(arguments)
    folders = options.folder or [FOLDER]
    try:
        targets = [target_named(name) for name in options.targets] or list(TARGETS)
    except KeyError as error:
        parser.error(f"no target {error}; there are {', '.join(target.name for target in TARGETS)}")
    try:
        require_mutmut()
        if options.action == "page":
            write_pages({target.name: workspace_of(target, folders) for target in targets})
        for target in targets if options.action == "run" else []:
            _run(target, folders[0], options)
        for target in targets if options.action == "survivors" else []:
            _print_survivors(target, folders)
    except MutationError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.mutation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=("run", "survivors", "page"))
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="by default all")
    parser.add_argument(
        "--folder",
        action="append",
        type=Path,
        help="where the copies are, instead of build/mutation; may be repeated to read those of several runs",
    )
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help="mutants that are tested together"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="forget all verdicts, as after a change of the tests"
    )
    parser.add_argument(
        "--survivors", action="store_true", help="test survivors without a reason again, as after new tests"
    )
    return parser


def _run(target: MutationTarget, folder: Path, options: argparse.Namespace) -> None:
    if options.fresh:
        shutil.rmtree(folder / target.name, ignore_errors=True)
    if options.survivors:
        forget_survivors(folder / target.name, read_reasons(target.name))
    workspace = prepare(target, folder)
    run(workspace, options.processes)
    _print_counts(target, workspace)


def _print_survivors(target: MutationTarget, folders: Sequence[Path]) -> None:
    workspace = workspace_of(target, folders)
    reasons = read_reasons(target.name)
    all_survivors = survivors(workspace, reasons)
    _print_counts(target, workspace)
    for survivor in all_survivors:
        if survivor.reason is None:
            print(f"{survivor.name}\n{survivor.change}")
    for reason in unused_reasons(target.name, all_survivors):
        print(f"{target.name}: a reason that explains nothing: {reason.text}", file=sys.stderr)


def _print_counts(target: MutationTarget, workspace: Path) -> None:
    by_mutant = require_verdicts(workspace)
    by_verdict = {verdict or "not tested": n for verdict, n in counts(by_mutant).items()}
    print(f"{target.name}: {len(by_mutant)} mutants:", ", ".join(f"{n} {v}" for v, n in by_verdict.items()))


if __name__ == "__main__":
    sys.exit(main())
