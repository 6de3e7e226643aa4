"""Runs the blocks of a page of docs/, and pastes what they print below them.

    python -m tools.page_blocks docs/start.md …            run the pages and rewrite their output
    python -m tools.page_blocks --check docs/start.md …    exit with 1 if a page shows another output

Blocks of a page run in order, in one empty folder. A block with a title (```jsonl title=texts.jsonl) is written to
that file. The commands of a ```sh block run as the command line does, the code of all ```python blocks of a page
shares its names. A block ```text after `<!-- output -->` holds what the block above it prints. A comment above a
block says that it does not run: `<!-- not run: why -->` never, `<!-- needs: pandas -->` only where that is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: What may stand above a block.
OUTPUT, NOT_RUN, NEEDS = "output", "not run", "needs"
_BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>output|not run|needs)(?:: (?P<detail>[^\n]*))? -->\n\n?)?"
    r"```(?P<kind>\w+)(?: (?P<info>[^\n]*))?\n(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
_NUMBER = re.compile(r"(?<![\w.])[-−]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
#: A whole number from which on the last digit may be another machine's rounding.
_ROUNDED = 100
#: Numbers with all their digits, as CSV has them, agree within single precision.
_RELATIVE = 1e-5


@dataclass(frozen=True)
class Block:
    """A fenced block: its kind, its code, where the code stands in the page, and the comment above it."""

    kind: str
    code: str
    start: int
    title: str | None
    mark: str | None
    detail: str | None

    @property
    def missing(self) -> list[str]:
        """The packages that this block needs and that are not installed."""
        names = re.split(r",\s*", self.detail or "") if self.mark == NEEDS else []
        return [name for name in names if importlib.util.find_spec(name) is None]

    @property
    def runs(self) -> bool:
        """Whether the block is run on this machine."""
        return self.mark not in (OUTPUT, NOT_RUN) and not self.missing


@dataclass(frozen=True)
class Printed:
    """What the block above an output block printed."""

    shown: Block
    text: str


def blocks(page: str) -> list[Block]:
    """Return all fenced blocks of a page."""
    return [
        Block(
            match["kind"],
            match["code"],
            match.start("code"),
            (re.search(r"title=\"?([\w./-]+)", match["info"] or "") or [None, None])[1],
            match["mark"],
            match["detail"],
        )
        for match in _BLOCK.finditer(page)
    ]


def run_page(page: str, folder: Path) -> Iterator[Printed]:
    """Run the blocks of a page in `folder` and yield each shown output with what was printed.

    Raises:
        ValueError: if a block cannot be run, or a command ends with another code than 0.
    """
    names: dict[str, object] = {"__name__": "page"}
    printed: str | None = None
    with contextlib.chdir(folder), _environment(COLUMNS="80"):
        for block in blocks(page):
            if block.mark == OUTPUT:
                if printed is not None:
                    yield Printed(block, printed)
                continue
            printed = None
            if not block.runs:
                continue
            if block.title:
                Path(block.title).parent.mkdir(parents=True, exist_ok=True)
                Path(block.title).write_text(block.code, encoding="utf-8")
            elif block.kind == "python":
                with contextlib.redirect_stdout(io.StringIO()) as stdout:
                    exec(compile(block.code, "page", "exec"), names)
                printed = stdout.getvalue()
            elif block.kind == "sh":
                printed = "".join(map(_run_command, _commands(block.code)))
            else:
                raise ValueError(
                    f"a block {block.kind!r} is neither code, nor a file with a title, nor marked"
                )


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _commands(code: str) -> Iterator[list[str]]:
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


def _run_command(words: list[str]) -> str:
    """Run one phaselens command and return what it prints; after `>`, write that to a file instead."""
    from phaselens.cli.entry import run_to_exit_code

    program, *arguments = words
    if program != "phaselens":
        raise ValueError(f"only phaselens commands run; mark the block that calls {program!r}")
    target = arguments[-1] if ">" in arguments[:-1] else None
    if target:
        arguments = arguments[: arguments.index(">")]
    raw = io.BytesIO()
    stdout, stderr = io.TextIOWrapper(raw, encoding="utf-8", write_through=True), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        code = run_to_exit_code(arguments)
    if code:
        raise ValueError(f"{shlex.join(words)} ended with code {code}: {stderr.getvalue().strip()}")
    if target:
        Path(target).write_bytes(raw.getvalue())
        return ""
    return raw.getvalue().decode("utf-8")


def trimmed(text: str) -> str:
    """Return printed text as a page shows it: without spaces at the ends of lines and blank lines around it."""
    lines = "\n".join(line.rstrip() for line in text.splitlines())
    return re.sub(r"\n{3,}", "\n\n", lines).strip("\n") + "\n"


def same_output(shown: str, printed: str) -> bool:
    """Return whether two outputs have the same words, and numbers that agree up to rounding.

    A number may differ by one in its last place, or by 1e-5 of itself; a whole number below 100 may not differ.
    """

    def words(text: str) -> str:
        return " ".join(re.sub("[─━]+", "", _NUMBER.sub("#", text)).split())

    pairs = list(zip(_NUMBER.findall(shown), _NUMBER.findall(printed), strict=False))
    return words(shown) == words(printed) and all(_agree(*pair) for pair in pairs)


def _agree(shown: str, printed: str) -> bool:
    decimals = len(shown.partition(".")[2])
    values = [float(text.replace("−", "-").replace(",", "")) for text in (shown, printed)]
    if not decimals and abs(values[0]) < _ROUNDED:
        return shown == printed
    return abs(values[0] - values[1]) < max(1.5 * 10**-decimals, _RELATIVE * abs(values[0]))


def with_output(page: str, outputs: list[Printed]) -> str:
    """Return a page with what its blocks printed."""
    for output in reversed(outputs):
        start = output.shown.start
        page = page[:start] + trimmed(output.text) + page[start + len(output.shown.code) :]
    return page


def main() -> int:
    """Run pages, and rewrite or check their output."""
    parser = argparse.ArgumentParser(description="Run the blocks of pages, and paste what they print.")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("pages", nargs="+", type=Path)
    options = parser.parse_args()
    code = 0
    for path in options.pages:
        page = path.read_text(encoding="utf-8")
        with tempfile.TemporaryDirectory() as folder:
            outputs = list(run_page(page, Path(folder)))
        if not options.check:
            path.write_text(with_output(page, outputs), encoding="utf-8")
        for output in outputs if options.check else []:
            if not same_output(output.shown.code, trimmed(output.text)):
                print(f"{path} shows\n{output.shown.code}\nand its command prints\n{trimmed(output.text)}")
                code = 1
    return code


if __name__ == "__main__":
    sys.exit(main())
