"""A progress bar on stderr while models are loaded and measured."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from phaselens.report import strings
from phaselens.runs import ModelPlan, Observer


class _Label(TextColumn):
    """A progress column with the task's label, which is never read as markup."""

    def __init__(self) -> None:
        super().__init__("{task.description}", markup=False)


class ProgressBar(Observer):
    """A progress bar for a run. Nothing is drawn if `quiet`, or if stderr is not a terminal.

    `announce` receives the plans of long runs, unless `quiet`.
    """

    def __init__(self, *, quiet: bool = False, announce: Callable[[ModelPlan], None] | None = None) -> None:
        self._announce = announce
        self.wants_plans = announce is not None and not quiet
        self._console = Console(file=sys.stderr, highlight=False, markup=False, emoji=False)
        columns = (_Label(), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeRemainingColumn())
        is_terminal = sys.stderr is not None and sys.stderr.isatty()
        self._progress = Progress(
            *columns, console=self._console, transient=True, disable=quiet or not is_terminal
        )
        self._task: TaskID | None = None
        self._n_done = 0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def planned(self, plan: ModelPlan) -> None:
        if self._announce is not None:
            self._announce(plan)

    def loading(self, label: str) -> None:
        self._next(f"loading {strings.printable(label)}", None)

    def measuring(self, label: str, n_tokens: int) -> None:
        self._next(f"measuring {strings.printable(label)}", n_tokens)

    def reading(self, n_tokens: float) -> None:
        if self._task is not None:
            self._progress.update(self._task, completed=self._n_done + n_tokens)

    def advance(self, n_tokens: int) -> None:
        self._n_done += n_tokens
        self.reading(0)

    def _next(self, description: str, total: int | None) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._n_done = 0
        self._task = self._progress.add_task(Text(description).plain, total=total)
