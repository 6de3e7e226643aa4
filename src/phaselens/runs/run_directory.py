"""The directory of a run: a record of what made it, files of finished shards, and results. Files appear complete."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from phaselens.data.new_files import remove_abandoned, write_new
from phaselens.errors import InputError, PhaseLensError
from phaselens.plugin import Table
from phaselens.runs.result import FailedShard

RECORD, RESULT = "run.json", "result.json"
FOLDERS = ("tables", "shards", "times", "figures", "errors")
DIRECTORY_SCHEMA = "phaselens.run-directory/1"
TABLE_SCHEMA = "phaselens.table/1"


class RunDirectory:
    """A directory that holds one run, or will hold one.

        run.json       what made the run: models, texts, parameters, versions; written before anything is measured
        shards/        one file of states for each model and shard, in each phase
        times/         how long each of these took
        tables/        METRIC.NAME.parquet
        figures/       pictures
        errors/        the traceback of each failed metric
        result.json    warnings, failures and times; written last

    Nothing that exists is changed. Results that lack failed shards are moved to `incomplete-1` when these are computed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @classmethod
    def to_write(cls, path: str | os.PathLike[str], *, fresh: bool = False) -> RunDirectory:
        """Return the directory at `path`; with `fresh`, one of a new name if `path` holds a run.

        Raises:
            InputError: for a path that cannot be a run's directory.
        """
        directory = cls(path)
        number = 2
        while fresh and directory._holds_files_of_a_run():
            directory = cls(Path(path).with_name(f"{Path(path).name}-{number}"))
            number += 1
        if directory.path.exists() and not directory.path.is_dir():
            raise InputError(f"--out {str(directory.path)!r} is a file; name a directory")
        own_names = directory._own_names()
        # The record is looked for last, because another process may just have begun the run: it writes it first.
        if own_names and not directory.has_record:
            raise InputError(
                f"--out {str(directory.path)!r} holds {' and '.join(own_names)}, but no {RECORD}, so it "
                "is not the directory of a run; name another one"
            )
        with directory.errors_explained(directory.path):
            directory.path.mkdir(parents=True, exist_ok=True)
            for name in FOLDERS:
                remove_abandoned(directory.path / name)
        return directory

    def _own_names(self) -> list[str]:
        return [name for name in (*FOLDERS, RESULT) if (self.path / name).exists()]

    def _holds_files_of_a_run(self) -> bool:
        return self.has_record or bool(self._own_names())

    @property
    def has_record(self) -> bool:
        """Whether the run has begun."""
        return (self.path / RECORD).is_file()

    @property
    def is_complete(self) -> bool:
        """Whether the run has ended and its results are written."""
        return (self.path / RESULT).is_file()

    @property
    def lacks_shards(self) -> bool:
        """Whether the results that are written lack shards that could not be computed."""
        return self.is_complete and bool(self.read_result().get("failed_shards"))

    @property
    def recorded_threads(self) -> int | None:
        """The number of threads of the run that has begun; None if none has."""
        return self._recorded_whole("threads")

    @property
    def recorded_batch_tokens(self) -> int | None:
        """The number of tokens in a batch of the run that has begun; None if none has."""
        return self._recorded_whole("batch_tokens")

    def _recorded_whole(self, option: str) -> int | None:
        if not self.has_record:
            return None
        number = self.read_record()["request"]["options"].get(option)
        return number if isinstance(number, int) else None

    def set_aside_results(self) -> Path:
        """Move the results of a run that lacked shards into a folder of their own, so that they can be made anew."""
        with self.errors_explained(self.path):
            number = 1
            while (folder := self.path / f"incomplete-{number}").exists():
                number += 1
            folder.mkdir()
            # The file that marks the run as complete goes first.
            for name in (RESULT, "tables", "figures", "errors"):
                if (self.path / name).exists():
                    (self.path / name).rename(folder / name)
        return folder

    def read_record(self) -> dict[str, Any]:
        """Return what `run.json` holds.

        Raises:
            InputError: for a file that is missing, or that another program or version wrote.
        """
        return self._read_json(RECORD)

    def read_result(self) -> dict[str, Any]:
        """Return what `result.json` holds."""
        return self._read_json(RESULT)

    def _read_json(self, name: str) -> dict[str, Any]:
        path = self.path / name
        try:
            values = json.loads(path.read_bytes())
        except FileNotFoundError as error:
            raise InputError(
                f"{str(self.path)!r} holds no {name}; name the directory of a run (--out)"
            ) from error
        except (ValueError, OSError) as error:
            raise InputError(f"{str(path)!r} cannot be read: {error}") from error
        schema = values.get("schema") if isinstance(values, dict) else None
        if schema != DIRECTORY_SCHEMA:
            raise InputError(
                f"{str(path)!r} has the schema {schema!r}; this phaselens reads {DIRECTORY_SCHEMA!r}"
            )
        return dict(values)

    def write_record(self, record: Mapping[str, Any]) -> bool:
        """Write `run.json` unless it exists, and return whether it did not."""
        return self._write_json(RECORD, record)

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write `result.json`, which marks the run as complete."""
        self._write_json(RESULT, result)

    def _write_json(self, name: str, values: Mapping[str, Any]) -> bool:
        content = {"schema": DIRECTORY_SCHEMA, **values}
        return self.write(name, (json.dumps(content, allow_nan=False, indent=1) + "\n").encode())

    def write(self, name: str, content: bytes, *, replace: bool = False) -> bool:
        """Write a file of the directory unless it exists, and return whether this call created it."""
        return self.write_by(name, lambda path: write_new(path, content, replace=replace))

    def write_by(self, name: str, write: Callable[[Path], bool]) -> bool:
        """Call `write` with the path of a file of the directory, in a folder that exists, and return its result."""
        path = self.path / name
        with self.errors_explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            return write(path)

    @contextlib.contextmanager
    def errors_explained(self, path: Path) -> Iterator[None]:
        """Convert an error of the file system to one that says what to do.

        Raises:
            PhaseLensError: naming the file and the reason.
        """
        try:
            yield
        except OSError as error:
            raise PhaseLensError(
                f"{str(path)!r} cannot be written: {error.strerror or error}; finished shards are kept, so "
                "mend this and run the same command again to continue"
            ) from error

    def write_failed_shard(self, shard: FailedShard) -> None:
        """Record that a shard could not be computed, for the process that merges the run."""
        owner = f".{slug(shard.texts_of)}" if shard.texts_of else ""
        name = f"errors/{slug(shard.model)}.{shard.phase}{owner}.{shard.shard:05d}.json"
        self.write(name, (json.dumps(shard.as_dict(), indent=1) + "\n").encode(), replace=True)

    def read_failed_shards(self) -> list[FailedShard]:
        """Return the shards that processes have recorded as failed."""
        files = sorted((self.path / "errors").glob("*.json"))
        return [FailedShard.from_dict(json.loads(file.read_bytes())) for file in files]

    def table_path(self, metric: str, name: str) -> Path:
        """Return the path of a table."""
        return self.path / "tables" / f"{_file_name(metric)}.{_file_name(name)}.parquet"

    def write_table(self, metric: str, version: str, name: str, table: Table) -> None:
        """Write a table as parquet. Units are in the metadata of the columns, the schema's version in the file's."""
        import pyarrow.parquet as parquet

        metadata = {
            "phaselens.schema": TABLE_SCHEMA,
            "phaselens.metric": metric,
            "phaselens.metric_version": version,
            "phaselens.table": name,
            "phaselens.help": table.spec.help,
            "phaselens.units": json.dumps({column.name: column.unit for column in table.spec.columns}),
        }
        arrow = table.to_arrow()
        arrow = arrow.replace_schema_metadata(metadata)
        buffer = io.BytesIO()
        parquet.write_table(arrow, buffer)
        self.write(f"tables/{self.table_path(metric, name).name}", buffer.getvalue())

    def read_rows(self, metric: str, name: str) -> list[tuple[Any, ...]]:
        """Return the rows of a table.

        Raises:
            InputError: for a file that is missing or damaged.
        """
        import pyarrow as pa
        import pyarrow.parquet as parquet

        path = self.table_path(metric, name)
        try:
            arrow = parquet.read_table(path)
        except (OSError, pa.ArrowInvalid) as error:
            raise InputError(f"{str(path)!r} cannot be read: {error}") from error
        return list(zip(*(column.to_pylist() for column in arrow.columns), strict=True))


def _file_name(name: str) -> str:
    """Return a name as part of a file's name, with unusual characters as %XX."""
    return (
        quote(name, safe=" +-_=@,").replace(".", "%2E")
        if name.startswith(".")
        else quote(name, safe=" +-_=@,.")
    )


def slug(label: str) -> str:
    """Return a label as part of a file's name, for people; it need not be unique."""
    return re.sub(r"[^\w.+-]+", "_", label, flags=re.ASCII).strip(".")[:60]
