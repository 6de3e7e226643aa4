"""What a run directory holds, in a few words: read from its record and the names of its files, without its tables."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phaselens.errors import InputError, is_list_like, short_form
from phaselens.plugin import DamagedState, read_state
from phaselens.runs.run_directory import RECORD, RunDirectory, slug
from phaselens.runs.shard_store import CONDITIONS, OBSERVATIONS


@dataclass(frozen=True)
class RunSummary:
    """A run in a directory.

    Attributes:
        path: the directory.
        started: when it began, in UTC and ISO 8601.
        models: labels of the models.
        metrics: names of the metrics, without those that only supply details to reports.
        n_texts: the number of texts.
        texts: the file, folder or name that they come from.
        state: `complete`, `failed` with the metrics that failed, or the number of finished shards, `12 of 40 shards`.
    """

    path: Path
    started: str
    models: tuple[str, ...]
    metrics: tuple[str, ...]
    n_texts: int
    texts: str
    state: str

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> RunSummary:
        """Return the summary of the run in a directory.

        Raises:
            InputError: for a directory without a run, or with a record that cannot be read.
        """
        directory = RunDirectory(path)
        record = directory.read_record()
        try:
            return cls(
                directory.path,
                record["times"]["started"],
                tuple(model["label"] for model in record["models"]),
                tuple(name for name, metric in record["metrics"].items() if metric.get("prints", True)),
                len(record["texts"]),
                record["options"]["texts"],
                _state(directory, record),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{str(directory.path / RECORD)!r} is incomplete: {error!r}") from error

    def as_dict(self) -> dict[str, Any]:
        """Return the summary as plain JSON values."""
        return {
            "directory": str(self.path),
            "started": self.started,
            "models": list(self.models),
            "metrics": list(self.metrics),
            "n_texts": self.n_texts,
            "texts": self.texts,
            "state": self.state,
        }


def _state(directory: RunDirectory, record: Mapping[str, Any]) -> str:
    if directory.is_complete:
        result = directory.read_result()
        n_failed = len(result.get("failed_shards", []))
        failed = [*result["failures"], *([f"{n_failed} shards"] if n_failed else [])]
        return f"failed: {', '.join(failed)}" if failed else "complete"
    shards = list(_shard_files(directory, record))
    n_finished = sum(is_finished for is_finished in shards)
    return f"{n_finished:,} of {len(shards):,} shards"


def _shard_files(directory: RunDirectory, record: Mapping[str, Any]) -> Iterator[bool]:
    """Yield whether its file exists, for each shard of each phase of each model.

    What a phase consists of is known once it is planned; before that, the conditions of causal metrics are taken to
    run on the texts.
    """
    stems = {_stem(path.name) for path in (directory.path / "shards").glob("*.safetensors")}
    is_causal = any(metric["causal"] for metric in record["metrics"].values())
    for number, model in enumerate(record["models"]):
        prefix = f"{number}-{slug(model['label'])}"
        n_shards = len(model["shards"])
        files = [
            f"{prefix}.{OBSERVATIONS}.{index:05d}" for index in range(n_shards if model["observes"] else 0)
        ]
        for phase in (OBSERVATIONS, CONDITIONS):
            planned = _planned_files(directory, prefix, phase)
            if planned is None and phase == CONDITIONS and is_causal:
                planned = [f"{prefix}.{phase}.{index:05d}" for index in range(n_shards)]
            files += planned or []
        yield from (file in stems for file in files)


def _stem(name: str) -> str:
    """Return the name of a shard's file without its digest and suffix."""
    return name.removesuffix(".safetensors").rpartition(".")[0]


def _planned_files(directory: RunDirectory, prefix: str, phase: str) -> list[str] | None:
    """Return the names, without digests, of the files of a phase's shards; None before it is planned."""
    for path in sorted((directory.path / "shards").glob(f"{prefix}.{phase}-plan.*.safetensors")):
        try:
            tasks = read_state(path)["tasks"]
        except (DamagedState, FileNotFoundError):
            continue
        return [
            f"{prefix}.{phase}{'.' + slug(task['texts_of']) if task['texts_of'] else ''}.{index:05d}"
            for task in tasks
            for index in range(len(task["shards"]))
        ]
    return None


def find_runs(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Return the run directories among `paths` and in the folders below them, in the order of their names.

    Links, and folders whose name begins with a dot, are not followed.

    Raises:
        InputError: for a path that is not a folder, or has no run.
    """
    if not is_list_like(paths):
        raise InputError(f"expected paths as a list of directories, received {short_form(paths)}")
    directories: dict[Path, None] = {}
    for name in paths:
        if not isinstance(name, str | os.PathLike):
            raise InputError(
                f"expected each of paths as the name of a directory, received {short_form(name)}"
            )
        path = Path(name)
        if not path.is_dir():
            problem = "is not a directory" if path.exists() else "does not exist"
            raise InputError(f"{str(path)!r} {problem}; name run directories (--out), or folders of them")
        runs = list(_runs_below(path))
        if not runs:
            raise InputError(f"{str(path)!r} holds no run: neither it nor a folder below it has a {RECORD}")
        directories.update(dict.fromkeys(runs))
    return list(directories)


def _runs_below(path: Path) -> Iterator[Path]:
    if (path / RECORD).is_file():
        yield path
        return
    for folder in sorted(path.iterdir()):
        if folder.is_dir() and not folder.is_symlink() and not folder.name.startswith("."):
            yield from _runs_below(folder)
