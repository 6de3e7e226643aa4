"""Plans of runs as text: for `phaselens run --plan`, and as a note before a long run."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from phaselens.report.strings import printable
from phaselens.report.terminal_layout import print_rows
from phaselens.runs import ModelPlan, RunPlan

_GIGABYTE = 1e9


def duration(seconds: float) -> str:
    """Return a time for people, with two units at most.

    >>> duration(0.4), duration(75), duration(7300), duration(200_000)
    ('under 1 s', '1 min 15 s', '2 h 1 min', '2 d 7 h')
    """
    whole = round(seconds)
    if whole < 1:
        return "under 1 s"
    units = (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1))
    parts: list[str] = []
    for name, size in units:
        count, whole = divmod(whole, size)
        if count or parts:
            parts.append(f"{count} {name}" if count else "")
    return " ".join(part for part in parts[:2] if part)


def gigabytes(n_bytes: int) -> str:
    """Return a number of bytes in GB.

    >>> gigabytes(1_234_000_000)
    '1.2 GB'
    """
    return f"{n_bytes / _GIGABYTE:.1f} GB"


def plan_sentence(plan: ModelPlan) -> str:
    """Return the plan of one model as a line."""
    passes = "; ".join(
        f"{planned.name} ({', '.join(planned.metrics)}): {planned.n_conditions} × {planned.n_forwards:,} forwards"
        for planned in plan.passes
    )
    return (
        f"{plan.label}: {plan.n_texts:,} texts, {plan.n_tokens:,} tokens, {plan.n_shards:,} shards; {passes}; about "
        f"{duration(plan.seconds)}, {gigabytes(plan.memory)} of {gigabytes(plan.available)} on {plan.device}"
    )


def print_plan(plan: RunPlan, output: Console) -> None:
    """Print what each model will take, then each of its passes, and the total."""
    print_rows(
        ["model", "texts", "cut", "tokens", "shards", "memory", "of", "on", "loading", "time"],
        [
            [
                model.label,
                f"{model.n_texts:,}",
                f"{model.n_cut:,}",
                f"{model.n_tokens:,}",
                f"{model.n_shards:,}",
                gigabytes(model.memory),
                gigabytes(model.available),
                model.device,
                duration(model.load_seconds),
                duration(model.seconds),
            ]
            for model in plan.models
        ],
        output,
    )
    output.print()
    print_rows(
        ["model", "pass", "texts", "tokens", "shards", "conditions", "forwards each", "time", "metrics"],
        [
            [
                model.label,
                planned.name,
                f"{planned.n_texts:,}",
                f"{planned.n_tokens:,}",
                f"{planned.n_shards:,}",
                str(planned.n_conditions),
                f"{planned.n_forwards:,}",
                duration(planned.seconds),
                ", ".join(planned.metrics),
            ]
            for model in plan.models
            for planned in model.passes
        ],
        output,
    )
    output.print()
    batches = ", ".join(f"{model.probe_tokens:,} tokens ({printable(model.label)})" for model in plan.models)
    output.print(Text(f"about {duration(plan.seconds)} in this process, from the largest batch: {batches}"))
    for note in [*plan.notes, *(failure for model in plan.models for failure in model.failures)]:
        output.print(Text(f"note: {printable(note)}", style="dim"))
