"""From whatever a command ends with to one line on stderr and an exit code."""

from __future__ import annotations

import _thread
import contextlib
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import click

from phaselens.cli.app import app
from phaselens.errors import PhaseLensError
from phaselens.report.words import plain

INTERRUPTED = 130


def run_to_exit_code(arguments: Sequence[str]) -> int:
    """Run the command that `arguments` spell. Errors become one line; a traceback comes with --debug only."""
    debug = "--debug" in arguments
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a sign shows ? in its place
    try:
        with insistent_interrupt():
            code = _invoke(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
    except (click.Abort, KeyboardInterrupt):
        return _complain("interrupted", INTERRUPTED, debug)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else error.format_message())
        return 2
    except click.ClickException as error:
        return _complain(error.format_message(), 2, debug)
    except PhaseLensError as error:
        return _complain(str(error), error.exit_code, debug)
    except BrokenPipeError:
        _forget_stdout()
        return 0
    except OSError as error:
        return _complain(f"{error.strerror or error}: {error.filename or 'standard output'}", 2, debug)
    except Exception as error:  # noqa: BLE001 - the last resort: a bug is told in one line too
        message = f"unforeseen {type(error).__name__}: {error}; please report it with what --debug prints"
        return _complain(message, 1, debug)
    return code


def _invoke(arguments: Sequence[str]) -> int:
    """The command's own exit code. (Not by `app.main`, which would answer Ctrl-C with a line of its own.)"""
    try:
        with app.make_context("phaselens", list(arguments)) as context:
            code = app.invoke(context)
    except click.exceptions.Exit as asked:  # --help and --version end so
        return asked.exit_code
    return code if isinstance(code, int) else 0


@contextlib.contextmanager
def insistent_interrupt() -> Iterator[None]:
    """Inside, Ctrl-C is repeated until it arrives.

    Python raises KeyboardInterrupt wherever it happens to be; in a finaliser, or in a library that catches
    everything, it is lost, and the command would go on as if nobody had asked it to stop.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals belong to the main thread
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        again = threading.Timer(1.0, _interrupt_again)
        again.daemon = True
        _repeats.append(again)
        again.start()
        raise KeyboardInterrupt

    def unraisable(lost: Any) -> None:
        if not issubclass(lost.exc_type, KeyboardInterrupt):
            sys.__unraisablehook__(lost)

    before = signal.signal(signal.SIGINT, interrupt)
    hook, sys.unraisablehook = sys.unraisablehook, unraisable
    try:
        yield
    except Exception as error:
        if _repeats:  # a library answered Ctrl-C by an error of its own, as NumPy does while it is imported
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        interrupt_was_heard()
        sys.unraisablehook = hook
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def patient_interrupt() -> Iterator[None]:
    """Inside, Ctrl-C waits until the end, so that what is printed is printed whole.

    A signal that arrives in the middle of a write also cuts that write short, and without a buffer (PYTHONUNBUFFERED)
    Python does not write what is left; so it is kept from this thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals belong to the main thread
        return
    waiting: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: waiting.append(number))
    can_block = hasattr(signal, "pthread_sigmask")
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT]) if can_block else set()
    try:
        yield
    finally:
        if can_block:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, before)
    if waiting:
        raise KeyboardInterrupt


#: Interrupts that will be repeated, unless the first one arrives.
_repeats: list[threading.Timer] = []


def interrupt_was_heard() -> None:
    """Ctrl-C has arrived and is being answered: repeat it no more. Another Ctrl-C counts anew."""
    while _repeats:
        _repeats.pop().cancel()


def _interrupt_again() -> None:
    """A real signal to the main thread, where there are such: it also ends a system call that waits."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    else:
        _thread.interrupt_main()


def say(kind: str, message: str) -> None:
    """One line on stderr."""
    click.echo(f"phaselens: {kind}: {plain(message)}", err=True)


def _complain(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    say("error", message)
    return code


def _forget_stdout() -> None:
    """Whoever read us has gone (`| head`): let Python's flush at exit go nowhere, instead of complaining."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def only_results_on_stdout(*, debug: bool) -> Iterator[None]:
    """Inside, what libraries print goes to stderr, and their log and warnings nowhere (unless `debug`)."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    disabled = logging.root.manager.disable
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        if not debug:
            os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
            warnings.simplefilter("ignore")
            logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(disabled)
