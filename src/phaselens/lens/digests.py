"""Digests of files; an unchanged file is read once."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from phaselens.lens.model_source import ModelSource

# Larger folders would take seconds to hash before anything is measured.
_HASH_UP_TO_BYTES = 1 << 30


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


def hash_source(source: ModelSource) -> dict[str, str]:
    """Return the sha256 of the files that a model was loaded from, by name; those of an adapter under ``adapter/``."""
    if source.gguf is not None:
        is_small = source.gguf.stat().st_size <= _HASH_UP_TO_BYTES
        files = {source.gguf.name: sha256(source.gguf)} if is_small else {}
    else:
        files = hash_files(source.folder)
    for prefix, folder in (("twin-adapter", source.adapter), ("adapter", source.named_adapter)):
        # The twin's own adapter keeps its name unless another one is on top of it.
        prefix = "adapter" if source.named_adapter is None else prefix
        files |= {f"{prefix}/{file}": digest for file, digest in hash_files(folder).items()}
    return files


def hash_files(folder: Path | None) -> dict[str, str]:
    """Return the sha256 of a checkpoint folder's files by name; empty without a folder and for folders over 1 GiB."""
    if folder is None:
        return {}
    suffixes = (".json", ".safetensors", ".bin", ".model")
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.suffix in suffixes)
    if sum(file.stat().st_size for file in files) > _HASH_UP_TO_BYTES:
        return {}
    return {file.name: sha256(file) for file in files}
