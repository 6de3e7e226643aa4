"""The results of mutation testing as Markdown: a table in docs/testing.md, and each survivor in docs/mutants.md."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, takewhile
from pathlib import Path

from tools.generated_blocks import with_block
from tools.mutation.verdicts import (
    KILLED,
    SURVIVED,
    TIMED_OUT,
    Survivor,
    counts,
    read_reasons,
    require_verdicts,
    survivors,
)
from tools.mutation.workspace import ROOT, MutationError

PAGE = ROOT / "docs" / "testing.md"
SURVIVORS = ROOT / "docs" / "mutants.md"
UNEXPLAINED = "No reason yet: a test may be missing"
#: Characters of a line of code that are shown, and of these before the first change.
_WIDTH, _BEFORE = 100, 40


def write_pages(workspaces: Mapping[str, Path]) -> None:
    """Write the results of targets into both pages.

    Args:
        workspaces: the copy of the repository in which each target was run, by the target's name.

    Mutants that an interrupted run has not tested are counted as such, and in no share.

    Raises:
        MutationError: for a target without mutants, or a page without a place for the results.
    """
    verdicts = {name: require_verdicts(workspace) for name, workspace in workspaces.items()}
    survived = {
        name: survivors(workspace, read_reasons(name), verdicts[name])
        for name, workspace in workspaces.items()
    }
    write_block(PAGE, "mutation", numbers(verdicts, survived))
    write_block(SURVIVORS, "mutants", listing(survived))


def numbers(
    verdicts: Mapping[str, Mapping[str, str | None]], survived: Mapping[str, Sequence[Survivor]]
) -> str:
    """Return the table of all targets."""
    lines = [
        "| target | mutants | tested | killed | timed out | survived | of these explained | killed of tested |",
        "|---|---|---|---|---|---|---|---|",
    ]
    total: Counter[str | None] = Counter()
    n_explained = 0
    for name, by_mutant in verdicts.items():
        by_verdict = counts(by_mutant)
        explained = sum(survivor.reason is not None for survivor in survived[name])
        lines.append(_row(f"`{name}`", by_verdict, explained))
        n_explained += explained
        total += by_verdict
    return "\n".join([*lines, _row("all", total, n_explained)]) + "\n"


def _row(name: str, by_verdict: Mapping[str | None, int], n_explained: int) -> str:
    killed, timed_out, survived = (by_verdict.get(verdict, 0) for verdict in (KILLED, TIMED_OUT, SURVIVED))
    n_tested = killed + timed_out + survived
    n = n_tested + by_verdict.get(None, 0)
    share = f"{100 * (killed + timed_out) / n_tested:.1f} %" if n_tested else "not measured"
    numbers = " | ".join(f"{count:,}" for count in (n, n_tested, killed, timed_out, survived, n_explained))
    return f"| {name} | {numbers} | {share} |"


def listing(survived: Mapping[str, Sequence[Survivor]]) -> str:
    """Return all survivors by target and reason, each with the change that no test noticed."""
    lines = []
    for name, mutants in survived.items():
        by_reason: dict[str, list[Survivor]] = defaultdict(list)
        for survivor in mutants:
            by_reason[survivor.reason or UNEXPLAINED].append(survivor)
        lines += [f"## {name}", ""]
        if not by_reason:
            lines += [
                "None of those tested; [testing.md](testing.md#mutation-testing) says how many were.",
                "",
            ]
        for reason in sorted(by_reason, key=lambda text: (text == UNEXPLAINED, -len(by_reason[text]), text)):
            lines += [
                f"{reason} ({len(by_reason[reason])}):",
                "",
                "<!-- not run: a difference -->",
                "",
                "```diff",
            ]
            lines += _changes(by_reason[reason])
            lines += ["```", ""]
    return "\n".join(lines)


def _changes(mutants: Sequence[Survivor]) -> Iterator[str]:
    """Yield the lines of a diff by function; all changes of one line of code follow that line."""
    ordered = sorted(mutants, key=lambda survivor: (survivor.function, survivor.before, survivor.after))
    for function, of_function in groupby(ordered, key=lambda survivor: survivor.function):
        yield f"@@ {function.removeprefix('phaselens.')}"
        for before, of_line in groupby(of_function, key=lambda survivor: survivor.before):
            afters = list(dict.fromkeys(survivor.after for survivor in of_line))
            start, end = _changed_span(before, afters)
            yield f"- {_excerpt(before, start, end)}"
            for after in afters:
                yield f"+ {_excerpt(after, start, end)}"


def _changed_span(before: str, afters: Sequence[str]) -> tuple[int, int]:
    """Return how many characters at the start and at the end of a line no change touches."""
    start = _n_common([before, *afters])
    return start, _n_common([text[start:][::-1] for text in (before, *afters)])


def _n_common(texts: Sequence[str]) -> int:
    """Return the number of first characters that all texts share."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*texts, strict=False)))


def _excerpt(line: str, start: int, end: int) -> str:
    """Return a line of code whose first `start` and last `end` characters are the context of a change, shortened."""
    if len(line) <= _WIDTH:
        return line
    first = max(0, start - _BEFORE) if start > _BEFORE else 0
    last = min(len(line), max(first + _WIDTH, len(line) - end + 1))
    return ("…" if first else "") + line[first:last] + ("…" if last < len(line) else "")


def write_block(page: Path, name: str, text: str) -> None:
    """Write `text` between the comments of a page; MutationError without them."""
    try:
        content = with_block(page.read_text(encoding="utf-8"), name, text, str(page))
    except ValueError as error:
        raise MutationError(str(error)) from error
    page.write_text(content, encoding="utf-8")
