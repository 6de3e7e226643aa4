"""Writes docs/studies/NAME.md of each shipped study from its file: `python -m tools.study_pages [--check]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from phaselens.runs import Study, read_study, shipped_studies

FOLDER = Path(__file__).parents[1] / "docs" / "studies"


def page(study: Study) -> str:
    """Return a study's page."""
    return "\n".join(_lines(study)) + "\n"


def _lines(study: Study) -> Iterator[str]:
    yield f"# {study.title}"
    yield ""
    yield f"Generated from `src/phaselens/data/studies/{study.name}.toml` by `python -m tools.study_pages`."
    yield ""
    yield f"{study.source}."
    yield ""
    yield study.description.strip()
    yield ""
    yield "<!-- not run: measures the models of the source -->"
    yield ""
    yield "```sh"
    yield f"phaselens study run {study.name}"
    yield "```"
    yield ""
    yield "| model | source |"
    yield "|---|---|"
    for model in study.models:
        yield f"| `{model.label}` | `{model.source}` |"
    for run in study.runs:
        yield ""
        yield f"## {run.name}"
        yield ""
        yield f"{run.description[0].upper()}{run.description[1:]}."
        yield ""
        texts = f"{len(run.texts)} texts in the file" if isinstance(run.texts, tuple) else run.texts
        settings = [f"texts: {texts}", *(f"{name}: {value}" for name, value in run.options.items())]
        yield f"- {', '.join(settings)}"
        for name, params in run.metrics.items():
            yield f"- `{name}`" + (
                f": {', '.join(f'{key} = {value}' for key, value in params.items())}" if params else ""
            )
        for reason in run.differs:
            yield f"- differs: {reason}"
        values = [value for value in study.values if value.run == run.name]
        if not values:
            continue
        yield ""
        yield "| value | model | published | stated in | what differs |"
        yield "|---|---|---|---|---|"
        keys = dict.fromkeys((value.quantity, value.model, value.place) for value in values)
        for key in keys:
            group = [value for value in values if (value.quantity, value.model, value.place) == key]
            numbers = [f"{value.published:g}" for value in group]
            shown = numbers[0] if len(group) == 1 else f"{len(group)} layers, {numbers[0]} to {numbers[-1]}"
            yield _row(key[0], f"`{key[1]}`", shown, key[2], "; ".join(group[0].differs))


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def main() -> int:
    """Write the pages, or with --check return 1 if one is out of date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    outdated = []
    for name in shipped_studies():
        path, text = FOLDER / f"{name}.md", page(read_study(name))
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            outdated.append(name)
            if not check:
                path.parent.mkdir(exist_ok=True)
                path.write_text(text, encoding="utf-8")
    if check and outdated:
        print(f"out of date: {', '.join(outdated)}; run python -m tools.study_pages", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
