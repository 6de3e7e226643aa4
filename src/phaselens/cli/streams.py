"""The two output streams: results on stdout, messages on stderr."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator

import click

from phaselens.report.strings import printable


def print_message(level: str, message: str, *, dim: bool = False) -> None:
    """Print `phaselens: LEVEL: MESSAGE` as one line on stderr, with control characters escaped."""
    line = f"phaselens: {level}: {printable(message)}"
    click.echo(click.style(line, dim=True) if dim else line, err=True)


def discard_stdout() -> None:
    """Discard Python's flush at exit after the reader of stdout has closed it (`| head`)."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def only_results_on_stdout(*, debug: bool) -> Iterator[None]:
    """Send what libraries print to stderr, and drop their log records and warnings unless `debug`."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    previous_level = logging.root.manager.disable
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        if not debug:
            os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
            warnings.simplefilter("ignore")
            logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(previous_level)
