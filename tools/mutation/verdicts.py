"""What became of each mutant, and why survivors survive."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tools.mutation.workspace import MutationError

REASONS = Path(__file__).with_name("reasons")
#: mutmut's exit codes of a mutant: a test failed; none failed; a test took far longer than without the mutant.
KILLED, SURVIVED, TIMED_OUT = "killed", "survived", "timed out"
_VERDICTS = {
    0: SURVIVED,
    33: SURVIVED,
    -24: TIMED_OUT,
    24: TIMED_OUT,
    36: TIMED_OUT,
    152: TIMED_OUT,
    255: TIMED_OUT,
}
#: Prints the difference that each of the mutants named on stdin makes, as JSON. Only mutmut knows where they are.
_SHOW = """
import json, sys
from mutmut.mutation.diff_apply import find_mutant, get_diff_for_mutant
names = json.load(sys.stdin)
print(json.dumps({name: get_diff_for_mutant(name, path=find_mutant(name).path) for name in names}))
"""


@dataclass(frozen=True)
class Survivor:
    """A mutant that no test noticed: its function, and the lines of the code that it replaces, and by what."""

    name: str
    function: str
    before: str
    after: str
    reason: str | None = None

    @property
    def change(self) -> str:
        """The change on one line each, as in a diff."""
        return f"- {self.before}\n+ {self.after}"


@dataclass(frozen=True)
class Reason:
    """Why mutants that make such a change survive: those whose function and change match the patterns."""

    text: str
    function: re.Pattern[str]
    change: re.Pattern[str]

    def explains(self, survivor: Survivor) -> bool:
        """Return whether this is the reason of a survivor."""
        return bool(self.function.search(survivor.function) and self.change.search(survivor.change))


def read_reasons(target: str) -> list[Reason]:
    """Return the reasons for a target and those for all, in the order in which they are tried."""
    return [*_reasons_in(target), *_reasons_in("common")]


def _reasons_in(name: str) -> list[Reason]:
    """Return the reasons of a file: TOML tables `reason` of `text`, `change` and `function`."""
    tables = tomllib.loads((REASONS / f"{name}.toml").read_text(encoding="utf-8")).get("reason", [])
    return [
        Reason(
            table["text"],
            re.compile(table.get("function", "")),
            re.compile(table.get("change", ""), re.MULTILINE | re.DOTALL),
        )
        for table in tables
    ]


def unused_reasons(target: str, survived: Sequence[Survivor]) -> list[Reason]:
    """Return the reasons for this target alone that explain no survivor, as after a change of the code."""
    return [reason for reason in _reasons_in(target) if not any(map(reason.explains, survived))]


def verdicts(workspace: Path) -> dict[str, str | None]:
    """Return the verdict of each mutant by its name; None for one that has not been tested."""
    by_mutant: dict[str, str | None] = {}
    for file in sorted(workspace.glob("mutants/**/*.py.meta")):
        for name, code in json.loads(file.read_text(encoding="utf-8"))["exit_code_by_key"].items():
            by_mutant[name] = None if code is None else _VERDICTS.get(code, KILLED)
    return by_mutant


def require_verdicts(workspace: Path) -> dict[str, str | None]:
    """Return the verdict of each mutant, None for one that has not been tested.

    Raises:
        MutationError: if there are no mutants.
    """
    by_mutant = verdicts(workspace)
    if not by_mutant:
        raise MutationError(f"{workspace} has no mutants; run python -m tools.mutation run {workspace.name}")
    return by_mutant


def forget_survivors(workspace: Path, reasons: Sequence[Reason]) -> None:
    """Forget the verdicts of survivors that no reason explains, and which tests reach what: new tests may kill them."""
    names = {survivor.name for survivor in survivors(workspace, reasons) if survivor.reason is None}
    for file in workspace.glob("mutants/**/*.py.meta"):
        recorded = json.loads(file.read_text(encoding="utf-8"))
        codes = recorded["exit_code_by_key"]
        recorded["exit_code_by_key"] = {name: None if name in names else code for name, code in codes.items()}
        file.write_text(json.dumps(recorded), encoding="utf-8")
    (workspace / "mutants" / "mutmut-stats.json").unlink(missing_ok=True)


def survivors(
    workspace: Path, reasons: Sequence[Reason], by_mutant: Mapping[str, str | None] | None = None
) -> list[Survivor]:
    """Return the survivors of a workspace, each with the first reason that explains it.

    Args:
        workspace: the copy of the repository.
        reasons: why mutants survive.
        by_mutant: the verdicts of the workspace, by default as they are now.
    """
    if by_mutant is None:
        by_mutant = require_verdicts(workspace)
    names = [name for name, verdict in by_mutant.items() if verdict == SURVIVED]
    diffs = read_diffs(workspace, names)
    return [_explained(_survivor(name, diffs[name]), reasons) for name in names]


def read_diffs(workspace: Path, names: Sequence[str]) -> Mapping[str, str]:
    """Return the difference that each of the mutants makes, as mutmut shows it."""
    if not names:
        return {}
    completed = subprocess.run(
        [sys.executable, "-c", _SHOW],
        cwd=workspace,
        input=json.dumps(names),
        capture_output=True,
        text=True,
        check=False,
    )
    if completed.returncode:
        cause = completed.stderr.strip().splitlines()[-1:] or [f"exit code {completed.returncode}"]
        raise MutationError(f"{workspace}: mutmut does not show its mutants: {cause[0]}")
    diffs: Mapping[str, str] = json.loads(completed.stdout.splitlines()[-1])
    return diffs


def _survivor(name: str, diff: str) -> Survivor:
    before, after = (" ".join(_lines(diff, sign)) for sign in "-+")
    module, _, mangled = name.rpartition(".")
    function = re.sub(r"__mutmut_\d+$", "", mangled)
    function = function.removeprefix("x_").removeprefix("xǁ").replace("ǁ", ".")
    return Survivor(name, f"{module}.{function}", before, after)


def _lines(diff: str, sign: str) -> Iterator[str]:
    for line in diff.splitlines():
        if line.startswith(sign) and not line.startswith(sign * 3):
            yield line[1:].strip()


def _explained(survivor: Survivor, reasons: Sequence[Reason]) -> Survivor:
    text = next((reason.text for reason in reasons if reason.explains(survivor)), None)
    return replace(survivor, reason=text)


def counts(by_mutant: Mapping[str, str | None]) -> Counter[str | None]:
    """Return the number of mutants by verdict."""
    return Counter(by_mutant.values())
