"""The generated parts of docs/families.md: the count in its first line, and a row for each model type."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

import transformers
from tools.families.trial import DTYPES, Trial

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
_BEGIN, _END = "<!-- generated: model types -->", "<!-- end of model types -->"
_HEAD = ("model type", "class", *DTYPES, "positions", "absent, or why it is refused")
SERVED, REFUSED, PROBLEM, UNBUILDABLE = "served", "refused", "problem", "cannot be built"


def with_results(page: str, trials: Sequence[Trial], types: Sequence[str]) -> str:
    """Return the page with the results of `trials` in place of the earlier ones of these model types.

    Args:
        types: every model type of the page, in order; rows of other types are dropped.
    """
    cells = _rows_of(page) | {trial.model_type: _cells(trial) for trial in trials}
    listed = [cells[model_type] for model_type in types if model_type in cells]
    rows = [_row(_HEAD), _row(["---"] * len(_HEAD)), *map(_row, listed)]
    n_served = list(verdicts("\n".join(rows)).values()).count(SERVED)
    title = (
        f"# Model families: {n_served} of the {len(listed)} causal language models in transformers "
        f"{transformers.__version__} are served"
    )
    _, _, following = page.partition("\n")
    pattern = re.compile(re.escape(_BEGIN) + ".*?" + re.escape(_END), re.DOTALL)
    if not pattern.search(following):
        raise ValueError(f"{PAGE.name} lacks the lines {_BEGIN} and {_END}")
    table = "\n".join([_BEGIN, "", *rows, "", _END])
    return f"{title}\n{pattern.sub(lambda _: table, following)}"


def verdict(trial: Trial, dtype: str = "float32") -> str:
    """Return the result of a trial in one dtype, in one word as it stands on the page."""
    if trial.unbuildable:
        return UNBUILDABLE
    if dtype in trial.refusals:
        return REFUSED
    is_served = trial.is_served if dtype == "float32" else dtype in trial.measurements
    return SERVED if is_served else PROBLEM


def verdicts(page: str, dtype: str = "float32") -> dict[str, str]:
    """Return the verdict on each model type in one dtype by its row of the page."""
    column = _HEAD.index(dtype)
    return {name: _verdict_of_cell(cells[column], cells[-1]) for name, cells in _rows_of(page).items()}


def errors(page: str, dtype: str) -> dict[str, float]:
    """Return the error in one dtype of each model type that is served in it, by its row of the page."""
    column = _HEAD.index(dtype)
    numbers = {name: re.match(r"[\d.e+-]+", cells[column]) for name, cells in _rows_of(page).items()}
    return {name: float(number[0]) for name, number in numbers.items() if number is not None}


def _rows_of(page: str) -> dict[str, list[str]]:
    """Return the cells of the row of each model type."""
    rows = {}
    for line in page.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if line.startswith("| `") and len(cells) == len(_HEAD):
            rows[cells[0].strip("`")] = cells
    return rows


def _verdict_of_cell(cell: str, explanation: str) -> str:
    if re.fullmatch(r"\d.*", cell):
        return SERVED
    return UNBUILDABLE if explanation.startswith("transformers ") else {"refused": REFUSED}.get(cell, PROBLEM)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(trial: Trial) -> list[str]:
    errors = [_error_cell(trial, dtype) for dtype in DTYPES]
    positions = " and ".join(sorted(set(trial.positions)))
    return [
        f"`{trial.model_type}`",
        f"`{trial.class_name}`",
        *errors,
        positions,
        _escaped(_explanation(trial)),
    ]


def _error_cell(trial: Trial, dtype: str) -> str:
    if dtype in trial.problems:
        return PROBLEM
    measurement = trial.measurements.get(dtype)
    if measurement is None:
        return "—" if trial.unbuildable else "refused"
    rounded = _rounded(measurement.worst) if measurement.statistics else "0 (no attention)"
    return rounded if dtype != "float32" or trial.is_served else f"**inexact: {rounded}**"


def _rounded(error: float) -> str:
    """Return an error, rounded up to one digit."""
    if error == 0 or not math.isfinite(error):
        return f"{error:g}"
    exponent = math.floor(math.log10(error))
    return f"{math.ceil(error / 10.0**exponent - 1e-9) * 10.0**exponent:.0e}"


def _explanation(trial: Trial) -> str:
    """Return why points are absent or the model is refused; once if the reason is the same for several dtypes."""
    if trial.unbuildable:
        return f"transformers {transformers.__version__} cannot run this class on text: {trial.unbuildable}"
    by_message: dict[str, list[str]] = {}
    for dtype, message in (trial.refusals | trial.problems).items():
        by_message.setdefault(message, []).append(dtype)
    messages = [
        message if len(dtypes) == len(DTYPES) else f"{', '.join(dtypes)}: {message}"
        for message, dtypes in by_message.items()
    ]
    return "; ".join([*(f"`{point}`: {reason}" for point, reason in trial.absent.items()), *messages])


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
