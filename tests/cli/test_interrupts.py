"""Ctrl-C while a library or the printing of results is at work."""

import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from phaselens.cli.interrupts import insistent_interrupt, patient_interrupt


@pytest.mark.slow
def test_an_interrupt_that_a_finaliser_swallows_is_repeated() -> None:
    script = """
import os, signal, time
from phaselens.cli.interrupts import insistent_interrupt

class Swallower:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)

try:
    with insistent_interrupt():
        Swallower()
        print("swallowed", flush=True)
        time.sleep(50)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""
    process = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=40
    )
    assert (process.stdout, process.stderr) == ("swallowed\ninterrupted\n", "")


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.01)


@pytest.mark.slow
def test_an_interrupt_does_not_cut_output_that_is_being_printed() -> None:
    """Run without a buffer, where a signal in the middle of a write would lose the remainder."""
    printing = """
from phaselens.cli.interrupts import patient_interrupt
try:
    with patient_interrupt():
        print("x" * 1_000_000)
        print("whole")
except KeyboardInterrupt:
    print("interrupted")
"""
    command = [sys.executable, "-u", "-c", printing]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout is not None
        assert process.stdout.read(1) == b"x"  # it is writing, and will fill the pipe
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        stdout, stderr = process.communicate(timeout=60)
    assert stderr == b""
    assert stdout == b"x" * 999_999 + b"\nwhole\ninterrupted\n"


def test_without_ctrl_c_nothing_is_raised_after_printing() -> None:
    previous_handler = signal.getsignal(signal.SIGINT)
    with patient_interrupt():
        pass
    assert signal.getsignal(signal.SIGINT) is previous_handler
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def answered_by_an_error() -> None:
    try:
        ctrl_c()
    except KeyboardInterrupt:
        raise ImportError("cannot load module more than once per process") from None


def test_an_interrupt_that_a_library_turns_into_an_error_is_an_interrupt() -> None:
    with pytest.raises(KeyboardInterrupt), insistent_interrupt():
        answered_by_an_error()
    with pytest.raises(ImportError), insistent_interrupt():
        raise ImportError("its own")


def test_a_terminated_command_shows_the_cursor_on_a_terminal() -> None:
    script = """
import time
from phaselens.cli.interrupts import insistent_interrupt
with insistent_interrupt():
    print("begun", flush=True)
    time.sleep(50)
"""
    terminal, its_side = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=its_side) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == -signal.SIGTERM
    os.close(its_side)
    assert b"\x1b[?25h" in os.read(terminal, 1000)
    os.close(terminal)
