"""Mutate parts of the package, and see whether tests notice.

    python -m tools.mutation run [TARGET …] [--processes N]     test the mutants that have no verdict yet
    python -m tools.mutation survivors [TARGET …]               print the survivors without a reason
    python -m tools.mutation page                               write the numbers and the survivors into the pages

mutmut makes the mutants, in copies of the repository under build/mutation. A run that was interrupted continues where
it stopped; after a change of the code, only the functions that changed are tested again.
"""

from __future__ import annotations

import argparse
import shutil
import sys

from tools.mutation.page import write_pages
from tools.mutation.targets import TARGETS, target_named
from tools.mutation.verdicts import counts, forget_survivors, read_reasons, survivors, verdicts
from tools.mutation.workspace import FOLDER, prepare, run


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.mutation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=("run", "survivors", "page"))
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="by default all")
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help="mutants that are tested together"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="forget all verdicts, as after a change of the tests"
    )
    parser.add_argument("--survivors", action="store_true", help="test survivors again, as after new tests")
    arguments = parser.parse_args()
    try:
        targets = [target_named(name) for name in arguments.targets] or list(TARGETS)
    except KeyError as error:
        parser.error(f"no target {error}; there are {', '.join(target.name for target in TARGETS)}")
    if arguments.action == "page":
        write_pages(FOLDER)
        return 0
    for target in targets:
        if arguments.action == "run":
            if arguments.fresh:
                shutil.rmtree(FOLDER / target.name, ignore_errors=True)
            if arguments.survivors:
                forget_survivors(FOLDER / target.name)
            code = run(prepare(target), arguments.processes)
            if code:
                print(
                    f"{target.name}: mutmut ended with {code}; see {FOLDER / target.name / 'mutmut.log'}",
                    file=sys.stderr,
                )
                return 1
        found = verdicts(FOLDER / target.name)
        print(f"{target.name}: {len(found)} mutants:", dict(counts(found)))
        if arguments.action == "survivors":
            for survivor in survivors(FOLDER / target.name, read_reasons(target.name)):
                if survivor.reason is None:
                    print(f"{survivor.name}\n{survivor.change}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
