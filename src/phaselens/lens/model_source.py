"""The model that an argument names: a name of PhaseLens, a folder, a file, a hub id, or a base and an adapter.

Imports no torch.
"""

from __future__ import annotations

import json
import os
import re
import stat
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from phaselens.errors import InputError, ModelError, close_matches, short_form
from phaselens.lens import packaged

BUNDLED = ("rope", "drope")
# Every name that `load` takes without a folder or a hub.
NAMES = (*BUNDLED, *packaged.names())

_HUB_NAME = re.compile(r"[A-Za-z0-9_](?:[\w.-]{0,94}[\w])?", re.ASCII)

SourceKind = Literal["bundled", "packaged", "folder", "file", "adapted", "other"]

_CONFIG = "config.json"
_ADAPTER_CONFIG = "adapter_config.json"
# Between a base model and an adapter.
_PLUS = "+"


@dataclass(frozen=True)
class ModelSource:
    """A named model, identified once at the boundary and then passed on.

    Attributes:
        name: the name or path as the user wrote it.
        kind: ``bundled`` and ``packaged`` are names of PhaseLens, ``folder`` and ``file`` paths that exist; ``adapted``
            is a base model and an adapter; ``other`` is any other name: a plugin's model, a hub id, or neither.
        path: the folder or file.
        revision: a commit, branch or tag of a hub id.
        parts: the base model and its adapter, of an ``adapted`` source.

    >>> ModelSource.identify("rope").kind, ModelSource.identify("org/model", "v1.0").location
    ('bundled', 'org/model')
    >>> [part.name for part in ModelSource.identify("org/model+org/adapter").parts]
    ['org/model', 'org/adapter']
    """

    name: str
    kind: SourceKind
    path: Path | None = None
    revision: str | None = None
    parts: tuple[ModelSource, ModelSource] | None = None

    @classmethod
    def identify(cls, name: str, revision: str | None = None) -> ModelSource:
        """Identify `name` by the file system. Names of PhaseLens go before paths, and paths before BASE+ADAPTER."""
        if not name:
            return cls(name, "other", revision=revision)
        if name in packaged.MODELS:
            return cls(name, "packaged", revision=revision)
        if name in BUNDLED:
            return cls(name, "bundled", revision=revision)
        path = Path(os.path.expanduser(name))
        try:
            mode = path.stat().st_mode
        except (OSError, ValueError):
            parts = cls._parts(name) if _PLUS in name and revision is None else None
            return cls(name, "adapted" if parts else "other", revision=revision, parts=parts)
        return cls(name, "folder" if stat.S_ISDIR(mode) else "file", path, revision)

    @classmethod
    def _parts(cls, name: str) -> tuple[ModelSource, ModelSource] | None:
        """Return the base and the adapter of BASE+ADAPTER; None if no + stands between two names of models."""
        for sign in re.finditer(re.escape(_PLUS), name):
            base, adapter = (cls._part(text) for text in (name[: sign.start()], name[sign.end() :]))
            if base is not None and adapter is not None:
                return base, adapter
        return None

    @classmethod
    def _part(cls, text: str) -> ModelSource | None:
        """Identify one side of BASE+ADAPTER, perhaps with @REVISION; None for what no model can be called."""
        source = cls.identify(text)
        if source.kind == "other" and "@" in text:
            hub_id, _, revision = text.partition("@")
            source = cls.identify(hub_id, revision or None)
        return source if source.kind != "other" or is_hub_id(source.name) else None

    @property
    def short(self) -> str:
        """The last part of the name; of a base and an adapter, both."""
        if self.parts is not None:
            return _PLUS.join(part.short for part in self.parts)
        return Path(self.name).name or self.name

    @cached_property
    def base(self) -> ModelSource:
        """The source of the model's weights and tokenizer: the base of an adapter, else the source itself.

        Raises:
            ModelError: for an adapter folder whose config names no base that is on this machine.
        """
        if self.parts is not None:
            return self.parts[0].base
        return self._base_of_adapter(self.path) if self._is_adapter_folder else self

    @property
    def _is_adapter_folder(self) -> bool:
        """Whether the path is a folder with an adapter and without a model."""
        if self.kind != "folder" or self.path is None or not (self.path / _ADAPTER_CONFIG).is_file():
            return False
        return not (self.path / _CONFIG).is_file() or not _has_model_weights(self.path)

    def _base_of_adapter(self, folder: Path | None) -> ModelSource:
        """Return the base that an adapter's config names; only a name given by the user can reach the network."""
        name = read_adapter_config(Path(str(folder)), self.name).get("base_model_name_or_path")
        advice = f"name it yourself: BASE{_PLUS}{self.name}"
        if not isinstance(name, str) or not name:
            raise ModelError(f"model {self.name!r} is an adapter whose config names no base model; {advice}")
        base = ModelSource.identify(name)
        if base.kind == "other" and folder is not None and (folder / name).is_dir():
            base = ModelSource.identify(str(folder / name))
        if base.kind == "other" and not (is_hub_id(name) and _is_cached(name)):
            raise ModelError(
                f"model {self.name!r} is an adapter of {name!r}, which is neither a folder nor in the local cache; "
                f"{advice}"
            )
        if base.parts is not None or base._is_adapter_folder:
            raise ModelError(
                f"model {self.name!r} is an adapter of {name!r}, another adapter; merge that one first"
            )
        return base

    @cached_property
    def location(self) -> str:
        """The folder or hub id to load the weights from; dequantises a packaged model at the first call ever.

        Raises:
            ModelError: for a path or package that is missing, and for a name that cannot be a hub id.
        """
        if self.base is not self:
            return self.base.location
        if self.kind == "packaged":
            return packaged.resolve(self.name)
        if self.kind == "bundled":
            return _bundled_folder(self.name)
        if self.kind == "folder":
            _require_checkpoint_folder(Path(str(self.path)), self.name)
            return str(self.path)
        if self.kind == "file":
            if self.gguf is None:
                raise ModelError(
                    f"model {self.name!r} is a file; name the checkpoint's folder instead, or a .gguf file"
                )
            return str(self.gguf.parent)
        _require_hub_id(self.name)
        return self.name

    @property
    def gguf(self) -> Path | None:
        """The absolute path of the GGUF file that holds the weights; None for a checkpoint of any other format.

        Raises:
            ModelError: as `base`.
        """
        path = self.base.path
        is_gguf = self.base.kind == "file" and path is not None and path.suffix.lower() == ".gguf"
        return path.absolute() if is_gguf and path is not None else None

    @property
    def folder(self) -> Path | None:
        """The checkpoint folder; None for a hub id and for a GGUF file.

        Raises:
            ModelError: as `location`.
        """
        return None if self.base.kind == "other" or self.gguf is not None else Path(self.location)

    @property
    def package(self) -> packaged.PackagedModel | None:
        """The entry of a packaged model."""
        return packaged.MODELS[self.base.name] if self.base.kind == "packaged" else None

    @property
    def adapter(self) -> Path | None:
        """The folder of the low-rank adapter that a packaged model adds to its weights.

        Raises:
            ModelError: where this installation lacks it.
        """
        has_adapter = self.package is not None and self.package.adapter is not None
        return packaged.adapter_folder(self.base.name) if has_adapter else None

    @cached_property
    def named_adapter(self) -> Path | None:
        """The folder of the adapter that the user named; None without one. A hub id is fetched unless it is cached.

        Raises:
            ModelError: for a folder without an adapter, and for a hub id that cannot be fetched.
        """
        if self.parts is None:
            return self.path if self._is_adapter_folder else None
        adapter = self.parts[1]
        folder = adapter.path if adapter.kind == "folder" else None
        if adapter.kind == "other":
            folder = _fetch_adapter(adapter)
        if folder is None or not (folder / _ADAPTER_CONFIG).is_file():
            raise ModelError(
                f"model {self.name!r}: {adapter.name!r} holds no {_ADAPTER_CONFIG}; write BASE{_PLUS}ADAPTER with a "
                "folder that peft has saved"
            )
        return folder


def require_adapter_scale(scale: object) -> None:
    """Raise InputError unless `scale` is None or a number from 0 to 1."""
    is_number = isinstance(scale, int | float) and not isinstance(scale, bool)
    if scale is not None and not (is_number and 0 <= float(str(scale)) <= 1):
        raise InputError(
            f"adapter_scale is {short_form(scale)}; give a number from 0 (the base) to 1, or leave it out"
        )


def read_adapter_config(folder: Path, name: str) -> dict[str, Any]:
    """Return the content of an adapter's config.

    Raises:
        ModelError: where it cannot be read, or is not a JSON object.
    """
    try:
        config = json.loads((folder / _ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"model {name!r}: its {_ADAPTER_CONFIG} cannot be read ({error})") from error
    if not isinstance(config, dict):
        raise ModelError(f"model {name!r}: its {_ADAPTER_CONFIG} holds no JSON object")
    return config


def _has_model_weights(folder: Path) -> bool:
    """Return whether a folder holds weights other than an adapter's."""
    return any(
        not path.name.startswith("adapter_")
        for path in (*folder.glob("*.safetensors"), *folder.glob("*.bin"))
    )


def _require_checkpoint_folder(folder: Path, name: str) -> None:
    """Raise ModelError for a folder that holds no checkpoint, or two things to load."""
    if not (folder / _CONFIG).is_file():
        gguf_files = sorted(path.name for path in folder.glob("*.gguf"))
        if gguf_files:
            raise ModelError(
                f"model {name!r}: the folder holds no {_CONFIG}, but GGUF files; name one of them: "
                f"{', '.join(str(Path(name, file)) for file in gguf_files[:3])}"
            )
        raise ModelError(
            f"model {name!r}: the folder holds no {_CONFIG}; name a Hugging Face checkpoint folder"
        )
    if (folder / _ADAPTER_CONFIG).is_file():
        raise ModelError(
            f"model {name!r}: the folder holds a model and an adapter; move the adapter into a folder of its own, and "
            f"name {name}{_PLUS}ADAPTER to apply it"
        )


def _is_cached(hub_id: str) -> bool:
    """Return whether the local cache of the hub holds this model's configuration."""
    import huggingface_hub

    return isinstance(huggingface_hub.try_to_load_from_cache(hub_id, _CONFIG), str)


def _fetch_adapter(adapter: ModelSource) -> Path:
    """Return the local folder of an adapter on the hub, with its config and safetensors file alone."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        folder = huggingface_hub.snapshot_download(
            adapter.name,
            revision=adapter.revision,
            allow_patterns=[_ADAPTER_CONFIG, "adapter_model.safetensors"],
        )
    except (OSError, ValueError, errors.HfHubHTTPError, errors.LocalEntryNotFoundError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"adapter {adapter.name!r} is neither a folder nor in the local cache, and the hub does not provide it: "
            f"{reason}"
        ) from error
    return Path(folder)


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
