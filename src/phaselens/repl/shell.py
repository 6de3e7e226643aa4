"""IPython for a session: one-line errors, completion, `%save_session`. Imported only when the REPL starts."""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from IPython.core.error import UsageError
from IPython.terminal.interactiveshell import TerminalInteractiveShell
from traitlets.config import Config

from phaselens.errors import PhaseLensError
from phaselens.repl.completion import matcher
from phaselens.repl.script import can_recreate_metric, script
from phaselens.repl.session import Session
from phaselens.report.strings import printable


class Shell(TerminalInteractiveShell):
    """IPython's terminal shell, with errors in one line unless `tracebacks` is set."""

    tracebacks = False

    def init_sys_modules(self) -> None:
        """Leave `__main__` unchanged: this shell runs inside a program."""

    def showsyntaxerror(self, filename: str | None = None, running_compiled_code: bool = False) -> None:
        """Print a syntax error in one line."""
        if self.tracebacks:
            show: Any = super().showsyntaxerror
            show(filename, running_compiled_code)
        else:
            print_error(sys.exc_info()[1])

    def showindentationerror(self) -> None:
        """Print an indentation error in one line."""
        self.showsyntaxerror()


def print_error(error: BaseException | None) -> None:
    """Print an error as one line on stderr."""
    if isinstance(error, PhaseLensError | UsageError):
        message = f"error: {error}"
    elif isinstance(error, KeyboardInterrupt):
        message = "interrupted"
    elif isinstance(error, SyntaxError):
        message = f"error: {type(error).__name__}: {error.msg}: {(error.text or '').strip()}"
    else:
        message = f"error: {type(error).__name__}: {error} (%tb shows where)"
    print(printable(message), file=sys.stderr)


def make_shell(
    session: Session,
    loads: dict[str, str],
    *,
    banner: str = "",
    tracebacks: bool = False,
    history: str | None = None,
) -> Any:
    """Create a `Shell` whose variables are the session's.

    Args:
        session: the verbs and the models.
        loads: for each label, the call that loads the model, for scripts.
        banner: printed on start.
        tracebacks: show errors as IPython does.
        history: the file for the input history; by default IPython's own.
    """
    config = Config()
    config.TerminalInteractiveShell.banner1 = banner
    config.TerminalInteractiveShell.confirm_exit = False
    config.TerminalInteractiveShell.term_title = False
    config.TerminalInteractiveShell.enable_tip = False
    # Jedi would add its own completions, and inspects torch for seconds.
    config.Completer.use_jedi = False
    if history is not None:
        config.HistoryManager.hist_file = history
    shell: Any = Shell.instance(config=config, user_ns=session.names)
    shell.tracebacks = tracebacks
    session.names = shell.user_ns
    if not tracebacks:
        shell.set_custom_exc((Exception, KeyboardInterrupt), _print_custom_error)
    shell.events.register("post_run_cell", lambda result: _show_new_prompts(session))
    shell.Completer.custom_matchers.append(matcher(session))

    def save_session(line: str) -> None:
        save(session, loads, line)

    save_session.__doc__ = save.__doc__
    shell.register_magic_function(save_session)
    return shell


def _print_custom_error(
    shell: Shell,
    error_class: type[BaseException],
    error: BaseException,
    traceback: TracebackType | None,
    tb_offset: int | None = None,
) -> None:
    """Print an error in one line; called by IPython."""
    # %tb reads these attributes.
    sys.last_type, sys.last_value, sys.last_traceback = error_class, error, traceback
    print_error(error)


def _show_new_prompts(session: Session) -> None:
    try:
        session.show_new_prompts()
    except PhaseLensError as error:
        print_error(error)


def save(session: Session, loads: dict[str, str], line: str) -> None:
    """Write a script that recreates the session's last state: %save_session FILE.py"""
    name = line.strip().strip("'\"")
    if not name:
        raise UsageError("save_session: name a file, %save_session FILE.py")
    text = script(session, loads)
    try:
        Path(name).expanduser().write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"save_session: {name} cannot be written: {reason}") from error
    print(f"written: {name}")
    metric = session.experiment.metric
    if not can_recreate_metric(session.experiment):
        print(
            printable(f"note: the script lacks the metric {metric.name}, which exists in this session only")
        )
