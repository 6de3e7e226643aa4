"""The results of mutation testing as Markdown: a table in docs/testing.md, and each survivor in docs/mutants.md."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from tools.mutation.targets import TARGETS
from tools.mutation.verdicts import (
    KILLED,
    SURVIVED,
    TIMED_OUT,
    Survivor,
    counts,
    read_reasons,
    survivors,
    verdicts,
)
from tools.mutation.workspace import ROOT

PAGE = ROOT / "docs" / "testing.md"
SURVIVORS = ROOT / "docs" / "mutants.md"
_BLOCK = "(?<=<!-- generated: {name} -->\n).*?(?=<!-- end of {name} -->)"


def write_pages(folder: Path) -> None:
    """Write the results of all targets into both pages.

    Raises:
        ValueError: for a target with mutants that have no verdict.
    """
    found = {target.name: verdicts(folder / target.name) for target in TARGETS}
    for name, by_mutant in found.items():
        n_missing = counts(by_mutant)[None]
        if n_missing or not by_mutant:
            raise ValueError(
                f"{name}: {n_missing or 'all'} mutants have no verdict; python -m tools.mutation run {name}"
            )
    survived = {target.name: survivors(folder / target.name, read_reasons(target.name)) for target in TARGETS}
    _write(PAGE, "mutation", numbers(found, survived))
    _write(SURVIVORS, "mutants", listing(survived))


def numbers(found: Mapping[str, Mapping[str, str | None]], survived: Mapping[str, Sequence[Survivor]]) -> str:
    """Return the table of all targets."""
    lines = [
        "| target | mutants | killed | timed out | survived | of these explained | killed, share |",
        "|---|---|---|---|---|---|---|",
    ]
    total: defaultdict[str | None, int] = defaultdict(int)
    n_explained = 0
    for name, by_mutant in found.items():
        by_verdict = counts(by_mutant)
        explained = sum(survivor.reason is not None for survivor in survived[name])
        lines.append(_row(f"`{name}`", by_verdict, explained))
        n_explained += explained
        for verdict, n in by_verdict.items():
            total[verdict] += n
    return "\n".join([*lines, _row("all", total, n_explained)]) + "\n"


def _row(name: str, by_verdict: Mapping[str | None, int], n_explained: int) -> str:
    killed, timed_out, survived = (by_verdict.get(verdict, 0) for verdict in (KILLED, TIMED_OUT, SURVIVED))
    n = killed + timed_out + survived
    share = 100 * (killed + timed_out) / n
    return f"| {name} | {n:,} | {killed:,} | {timed_out:,} | {survived:,} | {n_explained:,} | {share:.1f} % |"


def listing(survived: Mapping[str, Sequence[Survivor]]) -> str:
    """Return all survivors by target and reason, each with the change that no test noticed."""
    lines = []
    for name, mutants in survived.items():
        by_reason: dict[str, list[Survivor]] = defaultdict(list)
        for survivor in mutants:
            by_reason[survivor.reason or "No reason: a test is missing."].append(survivor)
        lines += [f"## `{name}`", ""]
        for reason in sorted(by_reason, key=lambda text: (-len(by_reason[text]), text)):
            group = by_reason[reason]
            lines += [f"**{reason}** ({len(group)})", "", "```diff"]
            for survivor in sorted(group, key=lambda survivor: survivor.name):
                lines += [f"@@ {survivor.function.removeprefix('phaselens.')}", survivor.change]
            lines += ["```", ""]
    return "\n".join(lines)


def _write(page: Path, name: str, text: str) -> None:
    content = page.read_text(encoding="utf-8")
    block = re.compile(_BLOCK.format(name=name), re.DOTALL)
    if not block.search(content):
        raise ValueError(f"{page} has no `<!-- generated: {name} -->` … `<!-- end of {name} -->`")
    page.write_text(block.sub(lambda _: text, content), encoding="utf-8")
