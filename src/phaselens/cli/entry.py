"""The entry point: runs a command and turns its outcome into an exit code, and an error into one line on stderr."""

from __future__ import annotations

import contextlib
import errno
import sys
import traceback
from collections.abc import Sequence

import click

from phaselens.cli.app import app
from phaselens.cli.completion_command import complete
from phaselens.cli.interrupts import insistent_interrupt
from phaselens.cli.shared_options import COMMAND_LINE
from phaselens.cli.streams import discard_stdout, print_message, private_stdout
from phaselens.errors import PhaseLensError
from phaselens.plugin.author_errors import describe_error

INTERRUPTED = 130
#: What to do about errors of the system, by their number.
_HINTS = {
    errno.EACCES: "; check its permissions, or name another place",
    errno.EPERM: "; check its permissions, or name another place",
    errno.EROFS: "; name a place that can be written to",
    errno.ENOSPC: "; free some space, or name another place",
    errno.EDQUOT: "; free some space, or name another place",
    errno.ENAMETOOLONG: "; give a shorter name",
}


def run_to_exit_code(arguments: Sequence[str]) -> int:
    """Run the command in `arguments` and return its exit code. An error is one line; --debug adds a traceback."""
    debug = "--debug" in arguments
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # characters that a terminal cannot show become ?
    try:
        with insistent_interrupt():
            # A session is the terminal's own.
            with contextlib.nullcontext() if arguments[:1] == ["repl"] else private_stdout():
                code = _invoke(arguments)
            if sys.stdout is not None:
                sys.stdout.flush()
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted", INTERRUPTED, debug)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else error.format_message())
        return 2
    except click.ClickException as error:
        return _fail(error.format_message(), 2, debug)
    except PhaseLensError as error:
        return _fail(str(error), error.exit_code, debug)
    except BrokenPipeError:
        discard_stdout()
        return 0
    except OSError as error:
        if error.filename is None:
            discard_stdout()
        hint = _HINTS.get(error.errno or 0, "")
        return _fail(f"{error.strerror or error}: {error.filename or 'standard output'}{hint}", 2, debug)
    except SystemExit:
        raise
    except BaseException as error:  # noqa: BLE001 - the last resort: a bug is one line too
        message = f"unforeseen {describe_error(error)}; please report it with the output of --debug"
        return _fail(message, 1, debug)
    return code


def _invoke(arguments: Sequence[str]) -> int:
    """Return the command's exit code. (`app.main` would print a line of its own on Ctrl-C.)"""
    completed = complete(app)
    if completed is not None:
        return completed
    try:
        with app.make_context("phaselens", list(arguments)) as context:
            context.meta[COMMAND_LINE] = ["phaselens", *arguments]
            code = app.invoke(context)
    except click.exceptions.Exit as exit_request:  # --help and --version end this way
        return exit_request.exit_code
    return code if isinstance(code, int) else 0


def _fail(message: str, code: int, debug: bool) -> int:
    """Print the error, with `debug` after its traceback, and return `code`."""
    if debug:
        traceback.print_exc()
    print_message("error", message)
    return code
