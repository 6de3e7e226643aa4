"""Write a file so that it appears complete or not at all."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

#: Ending of the names of files that are being written.
PARTIAL = ".partial"
#: A partial file that is older belongs to a process that was killed.
ABANDONED_AFTER_SECONDS = 3600.0


def write_new(path: Path, content: bytes, *, replace: bool = False) -> bool:
    """Write a file that does not exist yet, and return whether this call created it.

    The content is written under another name and flushed to the disk; then the file gets its name in one step. A file
    of that name is left as it is, unless `replace`, which is for a file that is damaged.

    Raises:
        OSError: for a folder that cannot be written to, or a full disk; the partial file is removed.
    """
    if not replace and path.exists():
        return False
    with partial_path(path) as partial:
        with partial.open("xb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        if replace:
            partial.replace(path)
            return True
        return _rename_to_new(partial, path)


@contextlib.contextmanager
def partial_path(path: Path) -> Iterator[Path]:
    """Yield an unused path beside `path`, and remove what is there at the end."""
    partial = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}{PARTIAL}")
    try:
        yield partial
    finally:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield an unused path beside `path` to write to; its file replaces that of `path` if the block raises nothing."""
    with partial_path(path) as partial:
        yield partial
        partial.replace(path)


def _rename_to_new(partial: Path, path: Path) -> bool:
    """Give a complete file its name unless another file has it."""
    try:
        os.link(partial, path)
    except FileExistsError:
        return False
    except OSError:  # the file system has no hard links
        if path.exists():
            return False
        partial.replace(path)
    return True


def remove_abandoned(folder: Path) -> None:
    """Remove partial files of processes that were killed more than an hour ago."""
    for partial in folder.glob(f".*{PARTIAL}"):
        with contextlib.suppress(OSError):
            if time.time() - partial.stat().st_mtime > ABANDONED_AFTER_SECONDS:
                partial.unlink()
