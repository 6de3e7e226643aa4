"""Handling of Ctrl-C: repeated until it is handled, delayed while something is printed; and of SIGTERM."""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any


@contextlib.contextmanager
def insistent_interrupt() -> Iterator[None]:
    """Repeat Ctrl-C until it is handled.

    Python raises KeyboardInterrupt in whatever code is running. In a finaliser, or in a library that catches
    everything, the exception is lost and the command would continue.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals belong to the main thread
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        repetition = threading.Timer(1.0, _interrupt_main_thread)
        repetition.daemon = True
        _repetitions.append(repetition)
        repetition.start()
        raise KeyboardInterrupt

    def unraisable(lost: Any) -> None:
        if not issubclass(lost.exc_type, KeyboardInterrupt):
            sys.__unraisablehook__(lost)

    previous_handler = signal.signal(signal.SIGINT, interrupt)
    previous_end = signal.signal(signal.SIGTERM, _end_with_cursor)
    previous_hook, sys.unraisablehook = sys.unraisablehook, unraisable
    try:
        yield
    except Exception as error:
        if _repetitions:
            # A library turned Ctrl-C into an error of its own, as NumPy does while it is imported.
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        stop_repeating()
        sys.unraisablehook = previous_hook
        signal.signal(signal.SIGTERM, previous_end)
        signal.signal(signal.SIGINT, previous_handler)


@contextlib.contextmanager
def patient_interrupt() -> Iterator[None]:
    """Delay Ctrl-C until the end of the block, so that its output is printed in full.

    A signal that arrives during a write also cuts that write short, and without a buffer (PYTHONUNBUFFERED) Python does
    not write the remainder, so the signal is blocked for this thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals belong to the main thread
        return
    pending: list[int] = []
    previous_handler = signal.signal(signal.SIGINT, lambda number, frame: pending.append(number))
    can_block = hasattr(signal, "pthread_sigmask")
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT]) if can_block else set()
    try:
        yield
    finally:
        if can_block:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, previous_handler)
    if pending:
        raise KeyboardInterrupt


def _end_with_cursor(number: int, frame: FrameType | None) -> None:
    """End the process as SIGTERM does by default, after showing the cursor that a progress bar hides."""
    with contextlib.suppress(OSError):
        if os.isatty(2):
            os.write(2, _SHOW_CURSOR)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


_SHOW_CURSOR = b"\r\x1b[K\x1b[?25h"

#: Timers that repeat the interrupt unless the first one is handled.
_repetitions: list[threading.Timer] = []


def stop_repeating() -> None:
    """Cancel the repetitions, as Ctrl-C is being handled. Another Ctrl-C starts new ones."""
    while _repetitions:
        _repetitions.pop().cancel()


def _interrupt_main_thread() -> None:
    """Interrupt the main thread, by a real signal if the system can, which also ends a blocking system call."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    else:
        _thread.interrupt_main()
