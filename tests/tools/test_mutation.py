"""Mutants' verdicts, reasons and pages from recorded results; the last test lets mutmut mutate a toy package."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
from tools.mutation import __main__ as command
from tools.mutation import page, verdicts, workspace
from tools.mutation.targets import TARGETS, MutationTarget, target_named
from tools.mutation.verdicts import Reason, Survivor

ROOT = Path(__file__).parents[2]
CODES = {"killed": 1, "survived": 0, "not reached": 33, "timed out": 36, "crashed": -11, "untested": None}


def write_results(folder: Path, codes: dict[str, int | None]) -> Path:
    """A workspace with mutmut's record of one module."""
    file = folder / "mutants" / "src" / "toy" / "sums.py.meta"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"exit_code_by_key": codes, "hash_by_function_name": {"x_add": "1"}}))
    return folder


def mutant(number: int, function: str = "x_add") -> str:
    return f"toy.sums.{function}__mutmut_{number}"


def diff(before: str, after: str) -> str:
    """A difference as mutmut shows it."""
    return f"--- src/toy/sums.py\n+++ src/toy/sums.py\n@@ -1,3 +1,3 @@\n def add(a, b):\n-    {before}\n+    {after}\n"


def survivor(
    before: str, after: str, *, function: str = "toy.sums.add", reason: str | None = None
) -> Survivor:
    return Survivor(f"{function}__mutmut_1", function, before, after, reason)


@pytest.fixture
def diffs(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The difference of each mutant, instead of mutmut's."""
    diffs: dict[str, str] = {}
    monkeypatch.setattr(verdicts, "read_diffs", lambda folder, names: {name: diffs[name] for name in names})
    return diffs


def test_codes_of_mutmut_are_verdicts(tmp_path: Path) -> None:
    write_results(tmp_path, {mutant(number): code for number, code in enumerate(CODES.values())})
    assert list(verdicts.verdicts(tmp_path).values()) == [
        "killed", "survived", "survived", "timed out", "killed", None,
    ]  # fmt: skip
    with pytest.raises(workspace.MutationError, match=r"has no mutants; run python -m tools\.mutation run "):
        verdicts.require_verdicts(tmp_path / "elsewhere")


def test_only_survivors_without_a_reason_are_forgotten(tmp_path: Path, diffs: dict[str, str]) -> None:
    codes = {**CODES, "explained": 0}
    write_results(tmp_path, {mutant(number): code for number, code in enumerate(codes.values())})
    diffs |= {mutant(number): diff("return a + b", "return a - b") for number in (1, 2)}
    diffs[mutant(6)] = diff("ROWS = 8", "ROWS = 9")
    statistics = tmp_path / "mutants" / "mutmut-stats.json"
    statistics.write_text("{}")
    verdicts.forget_survivors(tmp_path, [Reason("speed", re.compile(""), re.compile("ROWS"))])
    assert list(verdicts.verdicts(tmp_path).values()) == [
        "killed", None, None, "timed out", "killed", None, "survived",
    ]  # fmt: skip
    assert not statistics.exists()  # which tests reach a mutant is asked again
    (recorded,) = tmp_path.glob("mutants/**/*.meta")
    assert json.loads(recorded.read_text())["hash_by_function_name"] == {"x_add": "1"}


def test_survivors_have_their_function_change_and_first_reason(tmp_path: Path, diffs: dict[str, str]) -> None:
    method = mutant(3, "xǁTotalǁadd")
    write_results(tmp_path, {mutant(1): 0, mutant(2): 1, method: 33})
    diffs[mutant(1)] = diff("return a + b", "return a - b")
    diffs[method] = diff("self.n += 1", "self.n += 2").replace("-    self", "-    # a\n-    self")
    reasons = [
        Reason("other", re.compile("Total"), re.compile(r"- 2")),
        Reason("second", re.compile(r"sums\.add$"), re.compile(r"^\+ return a -", re.MULTILINE)),
        Reason("third", re.compile(""), re.compile("return")),
    ]
    first, second = verdicts.survivors(tmp_path, reasons)
    assert (first.function, first.change, first.reason) == (
        "toy.sums.add", "- return a + b\n+ return a - b", "second",
    )  # fmt: skip
    assert (second.function, second.before, second.after) == (
        "toy.sums.Total.add",
        "# a self.n += 1",
        "self.n += 2",
    )
    assert second.reason is None


@pytest.mark.parametrize("name", [*(target.name for target in TARGETS), "common"])
def test_reasons_are_complete_and_match_something_narrower_than_everything(name: str) -> None:
    assert (verdicts.REASONS / f"{name}.toml").exists()
    for reason in verdicts.read_reasons(name):
        assert reason.text.strip() == reason.text
        assert reason.text[-1] not in ".:"
        assert not (reason.function.pattern == "" and reason.change.pattern == ""), reason.text
        assert not reason.explains(survivor("value = table[key]", "value = None", function="toy.f")), (
            reason.text
        )


def test_reasons_that_explain_nothing_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "REASONS", tmp_path)
    (tmp_path / "toy.toml").write_text(
        '[[reason]]\ntext = "used"\nchange = "a - b"\n\n[[reason]]\ntext = "stale"\nfunction = "gone"\n'
    )
    (tmp_path / "common.toml").write_text('[[reason]]\ntext = "of others"\nchange = "strict"\n')
    assert [reason.text for reason in verdicts.read_reasons("toy")] == ["used", "stale", "of others"]
    survived = [survivor("return a + b", "return a - b")]
    assert [reason.text for reason in verdicts.unused_reasons("toy", survived)] == ["stale"]


def test_the_table_counts_timeouts_as_killed_and_adds_up() -> None:
    results: dict[str, dict[str, str | None]] = {
        "first": {"a": "killed", "b": "timed out", "c": "survived", "d": "killed"},
        "second": {"a": "killed", "b": None},
        "third": {"a": None},
    }
    survived = {"first": [survivor("a", "b", reason="equal")], "second": [], "third": []}
    table = page.numbers(results, survived)
    assert table.splitlines()[2:] == [
        "| `first` | 4 | 4 | 2 | 1 | 1 | 1 | 75.0 % |",
        "| `second` | 2 | 1 | 1 | 0 | 0 | 0 | 100.0 % |",
        "| `third` | 1 | 0 | 0 | 0 | 0 | 0 | not measured |",
        "| all | 7 | 5 | 3 | 1 | 1 | 1 | 80.0 % |",
    ]


def test_the_list_groups_survivors_by_reason_function_and_line() -> None:
    long_line = "raise InputError(" + "x" * 200 + ", size=10, last=" + "y" * 200 + ")"
    mutants = [
        survivor("n = len(rows)", "n = None", function="phaselens.b.two"),
        survivor("size = 1", "size = 3", function="phaselens.a.one", reason="speed"),
        survivor("size = 1", "size = 2", function="phaselens.a.one", reason="speed"),
        survivor(long_line, long_line.replace("10", "11"), function="phaselens.a.one", reason="speed"),
    ]
    text = page.listing({"toy": mutants, "clean": []})
    assert text.startswith("## toy\n\nspeed (3):\n\n<!-- not run: a difference -->\n\n```diff\n@@ a.one\n- …")
    assert text.count("@@ a.one") == 1
    assert "- size = 1\n+ size = 2\n+ size = 3\n```" in text
    mark = "<!-- not run: a difference -->"  # which a test of all pages asks for
    assert f"{page.UNEXPLAINED} (1):\n\n{mark}\n\n```diff\n@@ b.two\n- n = len(rows)\n+ n = None\n```" in text
    assert text.index("speed (3)") < text.index(page.UNEXPLAINED)
    assert max(map(len, text.splitlines())) < 110
    assert "size=10, last=" in text
    assert "size=11, last=" in text
    assert (
        "## clean\n\nNone of those tested; [testing.md](testing.md#mutation-testing) says how many were."
        in text
    )


def test_pages_keep_their_words_and_a_page_without_a_block_is_named(tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    file.write_text("before\n<!-- generated: mutants -->\nold\n<!-- end of mutants -->\nafter\n")
    page.write_block(file, "mutants", r"new \1" + "\n")
    assert (
        file.read_text() == "before\n<!-- generated: mutants -->\nnew \\1\n<!-- end of mutants -->\nafter\n"
    )
    with pytest.raises(workspace.MutationError, match=r"page\.md has no `<!-- generated: mutation -->`"):
        page.write_block(file, "mutation", "new")


def test_both_pages_are_written_from_several_folders(
    tmp_path: Path, diffs: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "require_mutmut", lambda: None)
    for name, attribute in (("mutation", "PAGE"), ("mutants", "SURVIVORS")):
        file = tmp_path / f"{name}.md"
        file.write_text(f"<!-- generated: {name} -->\n<!-- end of {name} -->\n")
        monkeypatch.setattr(page, attribute, file)
    write_results(tmp_path / "first" / "spectrum", {mutant(1): 0, mutant(2): 1})
    write_results(tmp_path / "second" / "attention", {mutant(1): 1})
    diffs[mutant(1)] = diff("return a + b", "return a - b")
    folders = [f"--folder={tmp_path / name}" for name in ("first", "second")]
    assert command.main(["page", "attention", "spectrum", *folders]) == 0
    assert "| all | 3 | 3 | 2 | 0 | 1 | 0 | 66.7 % |" in (tmp_path / "mutation.md").read_text()
    assert "+ return a - b" in (tmp_path / "mutants.md").read_text()
    assert command.main(["survivors", "spectrum", *folders]) == 0
    assert capsys.readouterr().out.startswith(
        f"spectrum: 2 mutants: 1 survived, 1 killed\n{mutant(1)}\n- return a + b\n+ return a - b\n"
    )
    assert command.main(["page", "uncertainty", *folders]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "uncertainty has not been run in" in line
    assert "run python -m tools.mutation run uncertainty" in line


def test_without_mutmut_one_line_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for action in ("run", "survivors", "page"):
        assert command.main([action]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line == "mutmut is not installed; pip install -c constraints.txt -e '.[mutation]'"
    with pytest.raises(SystemExit):
        command.main(["run", "spectre"])
    assert "no target 'spectre'; there are attention, spectrum," in capsys.readouterr().err


def test_targets_name_modules_and_tests_that_exist() -> None:
    for target in TARGETS:
        assert target_named(target.name) is target
        for pattern in target.modules:
            assert list(ROOT.glob(pattern)), pattern
        for test in target.tests:
            assert (ROOT / test.partition("::")[0]).exists(), test


TOY = {
    "src/toy/__init__.py": "",
    "src/toy/sums.py": "def add(a, b):\n    return a + b\n\n\ndef half(n):\n    return n / 2\n",
    "plugins/empty.py": "",
    "tests/test_sums.py": "from toy.sums import add, half\n\n\ndef test_add():\n    assert add(2, 0) == 2\n\n\n"
    "def test_half():\n    assert half(4) == 2\n",
    "pyproject.toml": "[tool.coverage.run]\nbranch = true\n\n[tool.pytest.ini_options]\npythonpath = ['src']\n"
    "markers = ['slow: takes long']\n",
}


def test_a_workspace_is_a_copy_with_the_settings_of_its_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tomllib

    target = write_toy(tmp_path / "repository", monkeypatch)
    copy = workspace.prepare(target, tmp_path / "build")
    (copy / "src" / "toy" / "gone.py").write_text("")
    (copy / "mutants").mkdir()
    assert workspace.prepare(target, tmp_path / "build") == copy == tmp_path / "build" / "toy"
    assert sorted(path.name for path in (copy / "src" / "toy").iterdir()) == ["__init__.py", "sums.py"]
    assert (copy / "mutants").is_dir()  # verdicts are kept
    settings = tomllib.loads((copy / "pyproject.toml").read_text())["tool"]
    assert set(settings) == {"pytest", "mutmut"}  # coverage.py would follow each mutant
    assert settings["mutmut"]["only_mutate"] == ["src/toy/*"]
    assert settings["mutmut"]["pytest_add_cli_args_test_selection"] == ["tests/test_sums.py"]


def write_toy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> MutationTarget:
    """Write the toy package as the repository, and return it as a target."""
    for name, text in TOY.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.setattr(workspace, "ROOT", folder)
    return MutationTarget("toy", ("src/toy/*",), ("tests/test_sums.py",))


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("mutmut") is None, reason="needs mutmut, of the extra `mutation`"
)
def test_mutmut_mutates_a_toy_package_and_a_second_run_tests_only_survivors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = write_toy(tmp_path / "repository", monkeypatch)
    copy = workspace.prepare(target, tmp_path / "build")
    workspace.run(copy, 1)
    results = verdicts.require_verdicts(copy)
    survived = verdicts.survivors(copy, [])
    # `add(2, 0)` does not see a minus; `half(4)` sees everything.
    assert [(mutant.function, mutant.change) for mutant in survived] == [
        ("toy.sums.add", "- return a + b\n+ return a - b")
    ]
    assert set(results.values()) == {"killed", "survived"}
    tests = tmp_path / "repository" / "tests" / "test_sums.py"
    tests.write_text(tests.read_text() + "\n\ndef test_one():\n    assert add(2, 1) == 3\n")
    verdicts.forget_survivors(copy, [])
    workspace.run(workspace.prepare(target, tmp_path / "build"), 1)
    assert set(verdicts.require_verdicts(copy).values()) == {"killed"}
    tests.write_text("def test_failing():\n    assert False\n")
    verdicts.forget_survivors(copy, [])
    with pytest.raises(
        workspace.MutationError, match=r"toy: mutmut ended with exit code \d+; see .*mutmut\.log"
    ):
        workspace.run(workspace.prepare(target, tmp_path / "build"), 1)


def test_a_workspace_that_mutmut_cannot_read_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> Any:
        return verdicts.subprocess.CompletedProcess(arguments, 1, "", "Traceback\nKeyError: 'a'\n")

    monkeypatch.setattr(verdicts.subprocess, "run", fail)
    with pytest.raises(workspace.MutationError, match="mutmut does not show its mutants: KeyError: 'a'"):
        verdicts.read_diffs(tmp_path, [mutant(1)])
    assert verdicts.read_diffs(tmp_path, []) == {}
