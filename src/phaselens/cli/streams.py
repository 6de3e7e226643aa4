"""The two output streams: results on stdout, messages on stderr."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import IO, ParamSpec, TextIO, TypeVar

import click

from phaselens.report.strings import printable

Options = ParamSpec("Options")
Returned = TypeVar("Returned")

#: Runs of symbols without a space that are longer are cut in messages, and messages that are longer at their end.
_LONGEST_WORD = 400
_LONGEST_MESSAGE = 2000
#: The stream of results, while `sys.stdout` is one of messages.
_results: list[IO[str] | None] = []


class UnclosableStream(io.TextIOWrapper):
    """A stream on a descriptor that a plugin cannot close, by mistake or otherwise."""

    def close(self) -> None:
        """Flush the stream, and leave it open."""
        self.flush()

    @classmethod
    def on(cls, descriptor: int, like: TextIO) -> UnclosableStream:
        """Return a stream with the settings of another one."""
        buffered = io.BufferedWriter(io.FileIO(descriptor, "wb", closefd=False))
        return cls(
            buffered,
            encoding=like.encoding,
            errors=like.errors,
            line_buffering=bool(getattr(like, "line_buffering", False)),
            write_through=bool(getattr(like, "write_through", False)),
        )


class MessageStream(io.TextIOBase):
    """A stand-in for stdout that writes to stderr and that nobody can close."""

    def write(self, text: str) -> int:
        """Write to stderr, if there is one."""
        if sys.stderr is not None:
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush stderr."""
        with contextlib.suppress(ValueError, OSError):
            if sys.stderr is not None:
                sys.stderr.flush()

    def close(self) -> None:
        """Leave the stream open."""

    def writable(self) -> bool:
        """Return True."""
        return True


def print_message(level: str, message: str, *, dim: bool = False) -> None:
    """Print `phaselens: LEVEL: MESSAGE` as one line on stderr, with control characters escaped."""
    line = f"phaselens: {level}: {_shortened(printable(message))}"
    try:
        click.echo(click.style(line, dim=True) if dim else line, err=True)
    except ValueError:  # a plugin has closed the stream
        with contextlib.suppress(OSError):
            os.write(2, f"{line}\n".encode(errors="replace"))


def _shortened(message: str) -> str:
    """Return a message without the middle of its long words, and without its end if it is long."""
    long_word = rf"\S{{{_LONGEST_WORD + 1},}}"
    message = re.sub(long_word, lambda word: f"{word[0][: _LONGEST_WORD // 2]}…{word[0][-40:]}", message)
    return message if len(message) <= _LONGEST_MESSAGE else f"{message[:_LONGEST_MESSAGE]}…"


def results_stream() -> IO[str] | None:
    """Return the stream for results: stdout, also while `sys.stdout` is one of messages; None if stdout is closed."""
    return _results[-1] if _results else sys.stdout


def only_results(command: Callable[Options, Returned]) -> Callable[Options, Returned]:
    """Decorate a command whose results go to `results_stream()`; what plugins print goes to stderr."""

    @functools.wraps(command)
    def run(*arguments: Options.args, **options: Options.kwargs) -> Returned:
        previous = sys.stdout
        _results.append(results_stream())
        sys.stdout = MessageStream()
        try:
            return command(*arguments, **options)
        finally:
            sys.stdout = previous
            _results.pop()

    return run


@contextlib.contextmanager
def private_stdout() -> Iterator[None]:
    """Keep the descriptor of stdout for `sys.stdout`: whatever else writes to descriptor 1 writes to stderr.

    Plugins and libraries may write to `sys.__stdout__`, to the descriptor, or through other processes.
    """
    original = sys.stdout
    try:
        is_descriptor_one = original is not None and original.fileno() == 1
    except (OSError, ValueError, AttributeError):  # closed, or in memory
        is_descriptor_one = False
    if not is_descriptor_one:
        yield
        return
    original.flush()
    descriptor = os.dup(1)
    _replace_descriptor(1, 2)
    sys.stdout = stream = UnclosableStream.on(descriptor, original)
    messages = sys.stderr
    if messages is not None:
        sys.stderr = UnclosableStream.on(2, messages)
    try:
        yield
    finally:
        for written in (original, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                written.flush()  # what a plugin wrote to it
        os.dup2(descriptor, 1)
        sys.stdout = open(1, "w", closefd=False) if original.closed else original  # noqa: SIM115
        sys.stderr = messages if messages is None or not messages.closed else sys.stderr
        try:
            stream.flush()
        finally:
            _replace_descriptor(descriptor, None)  # what could not be written is discarded
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
            os.close(descriptor)


def _replace_descriptor(descriptor: int, target: int | None) -> None:
    """Point a descriptor at another one, or at nothing if that is None or closed."""
    try:
        if target is not None:
            os.dup2(target, descriptor)
            return
    except OSError:
        pass
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, descriptor)
    os.close(nothing)


def discard_stdout() -> None:
    """Discard Python's flush at exit after the reader of stdout has closed it (`| head`)."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def only_results_on_stdout(*, debug: bool) -> Iterator[None]:
    """Send what libraries print to stderr, and drop their log records and warnings unless `debug`."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    previous_level = logging.root.manager.disable
    with contextlib.redirect_stdout(MessageStream()), warnings.catch_warnings():
        if not debug:
            os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
            warnings.simplefilter("ignore")
            logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(previous_level)
