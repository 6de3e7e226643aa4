"""A study: models, runs and published values with their sources, read from a TOML file. It is data and runs nothing."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from math import isfinite
from pathlib import Path
from typing import Any

from phaselens.errors import InputError, close_matches, is_list_like, is_number, is_whole, require_kind
from phaselens.plugin import CellValue

SCHEMA = "phaselens.study/1"
#: Separates reasons in the column `why` of a study's table.
REASON_SEPARATOR = " | "
#: How rows of a table become one value, where several rows fit.
REDUCTIONS = ("only", "mean", "min", "max", "argmin", "argmax")
#: Options of a run that a study may set.
OPTIONS = {"max_tokens": int, "n_texts": int, "bos": str, "seed": int, "dtype": str}


@dataclass(frozen=True)
class StudyModel:
    """A model of a study: its label, and where it comes from unless the reader names another one."""

    label: str
    source: str


@dataclass(frozen=True)
class StudyRun:
    """A protocol: texts, metrics with their parameters, options. `differs` says how it departs from the source's."""

    name: str
    description: str
    texts: str | tuple[str, ...]
    metrics: Mapping[str, Mapping[str, Any]]
    options: Mapping[str, Any]
    differs: tuple[str, ...]


@dataclass(frozen=True)
class PublishedValue:
    """A number that a source states, the place that states it, and what measures it here.

    `place` is a table, figure or file of the source. `differs` says why the number cannot be compared, beyond what the
    run's own `differs` says. The value measured is `column` of `table` of `metric`, in the rows that agree with `where`
    (and with `layer`), reduced by `reduce`.
    """

    quantity: str
    run: str
    model: str
    metric: str
    table: str
    column: str
    published: float
    place: str
    layer: int | None = None
    where: Mapping[str, CellValue] | None = None
    reduce: str = "only"
    differs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Study:
    """A study. `values` are in the order of the file; a list of values by layer is one value for each layer."""

    name: str
    title: str
    source: str
    description: str
    models: tuple[StudyModel, ...]
    runs: tuple[StudyRun, ...]
    values: tuple[PublishedValue, ...]
    folder: Path | None = None


def shipped_studies() -> list[str]:
    """Return the names of the studies that PhaseLens ships."""
    return sorted(
        path.name.removesuffix(".toml") for path in _shipped().iterdir() if path.name.endswith(".toml")
    )


def read_study(study: str | os.PathLike[str]) -> Study:
    """Return the study in a TOML file, or the shipped one of that name.

    Raises:
        InputError: for a file that is missing or not a study; names the entry and what to write.
    """
    if not isinstance(study, str | os.PathLike) or not os.fspath(study):
        raise InputError("expected study as the name of a shipped study, or a TOML file")
    name = os.fspath(study)
    if name in shipped_studies():
        return parse_study((_shipped() / f"{name}.toml").read_text(encoding="utf-8"), name)
    path = Path(name)
    if not path.is_file():
        raise InputError(f"no study {name!r}; {close_matches(name, shipped_studies())}, or a TOML file")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"study {name!r} cannot be read: {error}") from error
    return parse_study(text, name, path.parent)


def _shipped() -> Any:
    return files("phaselens.data") / "studies"


def parse_study(text: str, origin: str, folder: Path | None = None) -> Study:
    """Return the study in a TOML text. `origin` names it in messages; names of text files are relative to `folder`."""
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"study {origin!r} is not TOML: {error}") from error
    entry = _Entry(content, f"study {origin!r}")
    if content.get("schema") != SCHEMA:
        raise InputError(
            f"study {origin!r} has the schema {content.get('schema')!r}; this phaselens reads {SCHEMA!r}"
        )
    entry.forbid_others("schema", "name", "title", "source", "description", "models", "run", "value")
    models = _models(entry)
    runs = tuple(_run(item) for item in entry.items("run"))
    _require_distinct([run.name for run in runs], "run", origin)
    values = tuple(
        value
        for item in entry.items("value", required=False)
        for value in _values(item, [run.name for run in runs], [model.label for model in models])
    )
    return Study(
        entry.text("name"),
        entry.text("title"),
        entry.text("source"),
        entry.text("description"),
        models,
        runs,
        values,
        folder,
    )


class _Entry:
    """A table of the file, with checked access; messages name it."""

    def __init__(self, content: Mapping[str, Any], name: str) -> None:
        self.content = content
        self.name = name

    def forbid_others(self, *keys: str) -> None:
        """Raise InputError for a key that is not among `keys`."""
        for key in self.content:
            if key not in keys:
                raise InputError(f"{self.name} has the key {key!r}; {close_matches(key, keys)}")

    def _get(self, key: str, default: Any, fits: Callable[[Any], bool], expected: str) -> Any:
        if key not in self.content:
            if default is None:
                raise InputError(f"{self.name} has no {key!r}; give {expected}")
            return default
        value = self.content[key]
        if not fits(value):
            raise InputError(f"{self.name}: {key} is {value!r}; give {expected}")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """Return text that is not empty."""
        value: str = self._get(key, default, lambda value: isinstance(value, str) and bool(value), "text")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """Return a list of texts; empty without the key."""

        def fits(value: Any) -> bool:
            return isinstance(value, list) and all(isinstance(text, str) and text for text in value)

        texts = tuple(self._get(key, (), fits, "a list of texts"))
        for text in texts:
            if REASON_SEPARATOR.strip() in text:
                raise InputError(f"{self.name}: {key} holds a |, which separates reasons in tables: {text!r}")
        return texts

    def table(self, key: str, *, required: bool = False) -> Mapping[str, Any]:
        """Return a table; empty without the key, unless it is required."""
        value: Mapping[str, Any] = self._get(
            key, None if required else {}, lambda value: isinstance(value, dict), "a table"
        )
        return value

    def items(self, key: str, *, required: bool = True) -> Iterator[_Entry]:
        """Yield the tables of an array `[[key]]`."""

        def fits(value: Any) -> bool:
            return isinstance(value, list) and all(isinstance(item, dict) for item in value)

        values = self._get(key, None if required else (), fits, f"tables [[{key}]]")
        for number, value in enumerate(values, 1):
            label = value.get("name") or value.get("quantity") or f"number {number}"
            yield _Entry(value, f"{self.name}, {key} {label!r}")


def _models(entry: _Entry) -> tuple[StudyModel, ...]:
    sources = entry.table("models", required=True)
    for label, source in sources.items():
        if not isinstance(source, str) or not source:
            raise InputError(
                f"{entry.name}: model {label!r} is {source!r}; give its source, such as a hub id"
            )
    if not sources:
        raise InputError(f"{entry.name} names no model; write [models] with LABEL = SOURCE")
    return tuple(StudyModel(label, source) for label, source in sources.items())


def _run(entry: _Entry) -> StudyRun:
    entry.forbid_others("name", "description", "texts", "metrics", "differs", *OPTIONS)
    texts = entry.content.get("texts", "bundled")
    if isinstance(texts, list):
        if not texts or not all(isinstance(text, str) and text for text in texts):
            raise InputError(f"{entry.name}: texts holds something else than texts; give a list of texts")
        texts = tuple(texts)
    elif not isinstance(texts, str) or not texts or texts == "-":
        raise InputError(f'{entry.name}: texts is {texts!r}; give a list of texts, "bundled" or a file')
    options = {}
    for name, kind in OPTIONS.items():
        if name in entry.content:
            value = entry.content[name]
            if not (is_whole(value) if kind is int else isinstance(value, str)):
                raise InputError(f"{entry.name}: {name} is {value!r}; give {kind.__name__}")
            options[name] = value
    metrics = entry.table("metrics", required=True)
    for metric, params in metrics.items():
        if not isinstance(params, dict):
            raise InputError(
                f"{entry.name}: the parameters of {metric} are {params!r}; give a table, such as {{}}"
            )
    return StudyRun(
        entry.text("name"),
        entry.text("description"),
        texts,
        metrics,
        options,
        entry.texts("differs"),
    )


def _values(entry: _Entry, runs: Sequence[str], models: Sequence[str]) -> Iterator[PublishedValue]:
    """Yield the value of an entry, or one value for each layer where it lists several."""
    entry.forbid_others(
        "quantity", "run", "model", "metric", "table", "column", "layer", "where", "reduce", "published",
        "place", "differs",
    )  # fmt: skip
    for key, known_names in (("run", runs), ("model", models)):
        name = entry.text(key)
        if name not in known_names:
            raise InputError(f"{entry.name}: no {key} {name!r}; {close_matches(name, known_names)}")
    reduce = entry.text("reduce", "only")
    if reduce not in REDUCTIONS:
        raise InputError(f"{entry.name}: reduce is {reduce!r}; {close_matches(reduce, REDUCTIONS)}")
    published: Any = entry.content.get("published")
    layer = entry.content.get("layer")
    if layer is not None and (not is_whole(layer) or layer < 0):
        raise InputError(f"{entry.name}: layer is {layer!r}; give the index of a layer, from 0")
    is_list = is_list_like(published, list)
    numbers: list[Any] = list(published) if is_list else [published]
    fits = bool(numbers) and all(is_number(number) and isfinite(number) for number in numbers)
    if not fits or (is_list and layer is not None):
        raise InputError(
            f"{entry.name}: published is {published!r}; give a number, or without `layer` a list of numbers by layer"
        )
    for number_index, number in enumerate(numbers):
        yield PublishedValue(
            entry.text("quantity"),
            entry.text("run"),
            entry.text("model"),
            entry.text("metric"),
            entry.text("table"),
            entry.text("column"),
            float(number),
            entry.text("place"),
            number_index if is_list else layer,
            dict(entry.table("where")),
            reduce,
            entry.texts("differs"),
        )


def _require_distinct(names: Sequence[str], kind: str, origin: str) -> None:
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"study {origin!r} has two entries [[{kind}]] named {name!r}")


def require_measurable(study: Study) -> None:
    """Raise InputError for a metric, parameter, table or column that does not exist. No model is loaded."""
    from phaselens.plugin import plugins

    require_kind("study", study, Study, "made by read_study")
    metrics_of_runs = {run.name: run.metrics for run in study.runs}
    for run in study.runs:
        for name, params in run.metrics.items():
            try:
                plugins().metric(name).Params.parse(params)
            except InputError as error:
                raise InputError(
                    f"study {study.name!r}, run {run.name!r}, metric {name!r}: {error}"
                ) from error
    for value in study.values:
        owner = f"study {study.name!r}, value {value.quantity!r}"
        if value.metric not in metrics_of_runs[value.run]:
            raise InputError(
                f"{owner}: run {value.run!r} does not measure {value.metric!r}; "
                f"{close_matches(value.metric, metrics_of_runs[value.run])}"
            )
        try:
            spec = plugins().metric(value.metric).spec(value.table)
            for column in (
                value.column,
                *(value.where or {}),
                *(["layer"] if value.layer is not None else []),
            ):
                spec.index(column)
        except (InputError, LookupError) as error:
            raise InputError(f"{owner}: {' '.join(map(str, error.args))}") from error
