"""The console script `phaselens`, outside of the package so that Ctrl-C ends it quietly while that is imported."""

# The module signal is written in Python, and would be interrupted itself.
import _signal  # type: ignore[import-not-found]

_signal.signal(_signal.SIGINT, _signal.SIG_DFL)


def main() -> None:
    """Run the command line; a Ctrl-C before its own handler is in place ends the process without a traceback."""
    from phaselens.cli import main as run

    run()
