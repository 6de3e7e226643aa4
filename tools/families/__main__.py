"""Try model types; write docs/families.md if all are tried, or if asked."""

from __future__ import annotations

import argparse
import os
import sys

from tools.families.configs import model_types
from tools.families.page import PAGE, verdict, with_results
from tools.families.survey import survey


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.families", description=__doc__)
    parser.add_argument("types", nargs="*", metavar="MODEL_TYPE", help="by default all")
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help="trials that run at the same time"
    )
    parser.add_argument("--write", action="store_true", help="write the rows of the named types, too")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    types = arguments.types or model_types()
    trials = []
    for trial in survey(types, n_processes=arguments.processes):
        trials.append(trial)
        errors = {
            dtype: f"{measurement.worst:.1e}, logits {measurement.logits:.1e}"
            for dtype, measurement in trial.measurements.items()
        }
        messages = {*trial.refusals.values(), *trial.problems.values(), trial.unbuildable} - {""}
        print(f"{trial.model_type}: {verdict(trial)}", *errors.items(), *messages, sep="; ", flush=True)
    if not arguments.types or arguments.write:
        page = with_results(PAGE.read_text(encoding="utf-8"), trials, model_types())
        PAGE.write_text(page, encoding="utf-8")
        print(f"wrote {PAGE}", file=sys.stderr)


if __name__ == "__main__":
    main()
