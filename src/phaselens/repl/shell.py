"""IPython with a session in it: errors in one line, completion, `%save_session`. Imported only when the REPL starts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from IPython.core.error import UsageError
from IPython.terminal.interactiveshell import TerminalInteractiveShell
from traitlets.config import Config

from phaselens.errors import PhaseLensError
from phaselens.repl.completion import matcher
from phaselens.repl.script import metric_is_held, script
from phaselens.repl.session import Session
from phaselens.report.words import plain


class Shell(TerminalInteractiveShell):
    """IPython's terminal, saying errors in one line."""

    tracebacks = False

    def init_sys_modules(self) -> None:
        """Leave `__main__` what it is: this shell runs inside a program."""

    def showsyntaxerror(self, filename: str | None = None, running_compiled_code: bool = False) -> None:
        """What is not Python, in one line."""
        if self.tracebacks:
            show: Any = super().showsyntaxerror
            show(filename, running_compiled_code)
        else:
            complain(sys.exc_info()[1])

    def showindentationerror(self) -> None:
        """The same for wrong indentation."""
        self.showsyntaxerror()


def complain(error: BaseException | None) -> None:
    """One line on stderr."""
    if isinstance(error, PhaseLensError | UsageError):
        said = f"error: {error}"
    elif isinstance(error, KeyboardInterrupt):
        said = "interrupted"
    elif isinstance(error, SyntaxError):
        said = f"error: {type(error).__name__}: {error.msg}: {(error.text or '').strip()}"
    else:
        said = f"error: {type(error).__name__}: {error} (%tb shows where)"
    print(plain(said), file=sys.stderr)


def make_shell(
    session: Session,
    loads: dict[str, str],
    *,
    banner: str = "",
    tracebacks: bool = False,
    history: str | None = None,
) -> Any:
    """A shell whose variables are the session's.

    Args:
        session: the vocabulary and its models.
        loads: for each label, the call that loads the model again, for scripts.
        banner: what is printed on start.
        tracebacks: show errors as IPython does.
        history: the file that keeps lines; by default IPython's own.
    """
    config = Config()
    config.TerminalInteractiveShell.banner1 = banner
    config.TerminalInteractiveShell.confirm_exit = False
    config.TerminalInteractiveShell.term_title = False
    config.TerminalInteractiveShell.enable_tip = False
    # Jedi would run beside our own completion, and looks into torch for seconds.
    config.Completer.use_jedi = False
    if history is not None:
        config.HistoryManager.hist_file = history
    shell: Any = Shell.instance(config=config, user_ns=session.names)
    shell.tracebacks = tracebacks
    session.names = shell.user_ns
    if not tracebacks:
        shell.set_custom_exc((Exception, KeyboardInterrupt), _one_line)
    shell.events.register("post_run_cell", lambda result: _after(session))
    shell.Completer.custom_matchers.append(matcher(session))

    def save_session(line: str) -> None:
        save(session, loads, line)

    save_session.__doc__ = save.__doc__
    shell.register_magic_function(save_session)
    return shell


def _one_line(shell: Any, kind: Any, error: BaseException, trace: Any, tb_offset: int | None = None) -> None:
    # Where %tb looks for it.
    sys.last_type, sys.last_value, sys.last_traceback = kind, error, trace
    complain(error)


def _after(session: Session) -> None:
    try:
        session.after_line()
    except PhaseLensError as error:
        complain(error)


def save(session: Session, loads: dict[str, str], line: str) -> None:
    """Write a script that makes the session's last state again: %save_session FILE.py"""
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
    if not metric_is_held(session.experiment):
        print(plain(f"note: without the metric {metric.name}, which exists in this session only"))
