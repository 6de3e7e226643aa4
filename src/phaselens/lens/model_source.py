"""The model that an argument names: a name of PhaseLens, a checkpoint folder or a hub id. Imports no torch."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Literal

from phaselens.errors import ModelError, close_matches
from phaselens.lens import packaged

BUNDLED = ("rope", "drope")
# Every name that `load` takes without a folder or a hub.
NAMES = (*BUNDLED, *packaged.names())

_HUB_NAME = re.compile(r"[A-Za-z0-9_](?:[\w.-]{0,94}[\w])?", re.ASCII)

SourceKind = Literal["bundled", "packaged", "folder", "file", "other"]


@dataclass(frozen=True)
class ModelSource:
    """A named model, identified once at the boundary and then passed on.

    Attributes:
        name: the name or path as the user wrote it.
        kind: ``bundled`` and ``packaged`` are names of PhaseLens, ``folder`` and ``file`` paths that exist; ``other``
            is any other name: a plugin's model, a hub id, or neither.
        path: the folder or file.
        revision: a commit, branch or tag of a hub id.

    >>> ModelSource.identify("rope").kind, ModelSource.identify("org/model", "v1.0").location
    ('bundled', 'org/model')
    """

    name: str
    kind: SourceKind
    path: Path | None = None
    revision: str | None = None

    @classmethod
    def identify(cls, name: str, revision: str | None = None) -> ModelSource:
        """Identify `name` by one look at the file system. Names of PhaseLens go before paths."""
        if name in packaged.MODELS:
            return cls(name, "packaged", revision=revision)
        if name in BUNDLED:
            return cls(name, "bundled", revision=revision)
        path = Path(os.path.expanduser(name))
        try:
            mode = path.stat().st_mode
        except (OSError, ValueError):
            return cls(name, "other", revision=revision)
        return cls(name, "folder" if stat.S_ISDIR(mode) else "file", path, revision)

    @cached_property
    def location(self) -> str:
        """The checkpoint folder or hub id to load from; dequantises a packaged model at the first call ever.

        Raises:
            ModelError: for a path or package that is missing, and for a name that cannot be a hub id.
        """
        if self.kind == "packaged":
            return packaged.resolve(self.name)
        if self.kind == "bundled":
            return _bundled_folder(self.name)
        if self.kind == "folder":
            if not Path(str(self.path), "config.json").is_file():
                raise ModelError(
                    f"model {self.name!r}: the folder holds no config.json; name a Hugging Face checkpoint folder"
                )
            return str(self.path)
        if self.kind == "file":
            raise ModelError(f"model {self.name!r} is a file; name the checkpoint's folder instead")
        _require_hub_id(self.name)
        return self.name

    @property
    def folder(self) -> Path | None:
        """The checkpoint folder; None for a hub id.

        Raises:
            ModelError: as `location`.
        """
        return None if self.kind == "other" else Path(self.location)

    @property
    def package(self) -> packaged.PackagedModel | None:
        """The entry of a packaged model."""
        return packaged.MODELS[self.name] if self.kind == "packaged" else None

    @property
    def adapter(self) -> Path | None:
        """The folder of the low-rank adapter that a packaged model adds to its weights.

        Raises:
            ModelError: where this installation lacks it.
        """
        has_adapter = self.package is not None and self.package.adapter is not None
        return packaged.adapter_folder(self.name) if has_adapter else None


def _bundled_folder(name: str) -> str:
    folder = resources.files("phaselens.data") / "models" / name
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"model {name!r}: the bundled checkpoint is not in this installation; reinstall phaselens"
        )
    return str(folder)


def _require_hub_id(name: str) -> None:
    """Raise ModelError for a name that looks like a path, or that no repository on the hub can have."""
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    if looks_like_path:
        raise ModelError(
            f"model {name!r}: no such folder; name a checkpoint folder, a hub id, or one of {', '.join(NAMES)}"
        )
    if not is_hub_id(name):
        raise ModelError(
            f"model {name!r}: neither one of {', '.join(NAMES)}, nor a folder, nor a hub id like "
            f"owner/name or gpt2; {close_matches(name, NAMES)}"
        )


def is_hub_id(name: str) -> bool:
    """Return whether a hub repository can have this name: `owner/name`, or only a name, as for the oldest models.

    >>> is_hub_id("gpt2"), is_hub_id("org/model-1.5"), is_hub_id("no model"), is_hub_id("a/b/c")
    (True, True, False, False)
    """
    owner_and_name = name.split("/")
    return len(owner_and_name) <= 2 and all(
        _HUB_NAME.fullmatch(part) and "--" not in part and ".." not in part for part in owner_and_name
    )
