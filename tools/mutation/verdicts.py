"""What became of each mutant, and why survivors survive."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

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
    """Return the reasons for a target and those for all: TOML tables `reason` of `text`, `change` and `function`."""
    tables = [
        table
        for name in (target, "common")
        for table in tomllib.loads((REASONS / f"{name}.toml").read_text(encoding="utf-8")).get("reason", [])
    ]
    return [
        Reason(
            table["text"],
            re.compile(table.get("function", "")),
            re.compile(table.get("change", ""), re.MULTILINE | re.DOTALL),
        )
        for table in tables
    ]


def verdicts(workspace: Path) -> dict[str, str | None]:
    """Return the verdict of each mutant by its name; None for one that has not been tested."""
    found: dict[str, str | None] = {}
    for file in sorted(workspace.glob("mutants/**/*.py.meta")):
        for name, code in json.loads(file.read_text(encoding="utf-8"))["exit_code_by_key"].items():
            found[name] = None if code is None else _VERDICTS.get(code, KILLED)
    return found


def forget_survivors(workspace: Path) -> None:
    """Forget the verdicts of survivors and which tests reach what, so that they are tested again, with new tests."""
    for file in workspace.glob("mutants/**/*.py.meta"):
        recorded = json.loads(file.read_text(encoding="utf-8"))
        codes = recorded["exit_code_by_key"]
        recorded["exit_code_by_key"] = {
            name: None if _VERDICTS.get(code) == SURVIVED else code for name, code in codes.items()
        }
        file.write_text(json.dumps(recorded), encoding="utf-8")
    (workspace / "mutants" / "mutmut-stats.json").unlink(missing_ok=True)


def survivors(workspace: Path, reasons: Sequence[Reason]) -> list[Survivor]:
    """Return the survivors of a workspace, each with the first reason that explains it."""
    names = [name for name, verdict in verdicts(workspace).items() if verdict == SURVIVED]
    shown = subprocess.run(
        [sys.executable, "-c", _SHOW],
        cwd=workspace,
        input=json.dumps(names),
        capture_output=True,
        text=True,
        check=True,
    )
    diffs: Mapping[str, str] = json.loads(shown.stdout.splitlines()[-1]) if names else {}
    return [_explained(_survivor(name, diffs[name]), reasons) for name in names]


def _survivor(name: str, diff: str) -> Survivor:
    removed, added = (" ".join(_lines(diff, sign)) for sign in "-+")
    module, _, mangled = name.rpartition(".")
    function = re.sub(r"__mutmut_\d+$", "", mangled)
    function = function.removeprefix("x_").removeprefix("xǁ").replace("ǁ", ".")
    return Survivor(name, f"{module}.{function}", removed, added)


def _lines(diff: str, sign: str) -> Iterator[str]:
    for line in diff.splitlines():
        if line.startswith(sign) and not line.startswith(sign * 3):
            yield line[1:].strip()


def _explained(survivor: Survivor, reasons: Sequence[Reason]) -> Survivor:
    text = next((reason.text for reason in reasons if reason.explains(survivor)), None)
    return Survivor(survivor.name, survivor.function, survivor.before, survivor.after, text)


def counts(found: Mapping[str, str | None]) -> Counter[str | None]:
    """Return the number of mutants by verdict."""
    return Counter(found.values())
