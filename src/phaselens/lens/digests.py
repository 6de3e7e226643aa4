"""Digests of files; an unchanged file is read once."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path


def sha256(path: Path) -> str:
    """Return the hexadecimal sha256 of a file.

    The digest is cached while the file's size and times of change stay the same: a run needs the
    digest of half a gigabyte of weights several times.

    Raises:
        OSError: for a file that cannot be read.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder, "empty")
    ...     file.touch()
    ...     sha256(file)[:8]
    'e3b0c442'
    """
    status = path.stat()
    # The inode's time too: a copy or an archive can give another file of one size the same modification time.
    return _digest(path.absolute(), status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@lru_cache(maxsize=1024)
def _digest(path: Path, *_state: int) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
