"""What a worker has to know about a run, as JSON values, and the orders that it gets."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from phaselens.data import Text
from phaselens.errors import InputError
from phaselens.plugin import plugins
from phaselens.runs.crew import UnitName
from phaselens.runs.model_session import ModelSession
from phaselens.runs.observer import Observer
from phaselens.runs.run_options import ModelSpec, RunOptions, SelectedMetric, select_metrics

#: Distributions of metrics that are not installed, which are found by their path.
_BY_PATH = ("file", "folder")


class Order(NamedTuple):
    """A unit to compute, or the plan of a phase to make (`shard` is None).

    Attributes:
        model: number of the model.
        phase: `observations` or `conditions`.
        texts_of: the metric whose texts the unit has; empty for the run's texts.
        shard: number of the shard.
        names: metrics to run.
        lost: units of the model that are left out.
    """

    model: int
    phase: str
    texts_of: str
    shard: int | None
    names: tuple[str, ...]
    lost: tuple[UnitName, ...] = ()

    @classmethod
    def from_list(cls, values: Sequence[Any]) -> Order:
        """Return the order in the JSON values of another one."""
        model, phase, texts_of, shard, names, lost = values
        units = tuple((name, owner, number) for name, owner, number in lost)
        return cls(model, phase, texts_of, shard, tuple(names), units)


@dataclass(frozen=True)
class WorkerJob:
    """A run for workers: everything but the files of its models, its directory and its plugins.

    Attributes:
        out: the run's directory.
        models: the models.
        labels: their labels.
        texts: the run's texts.
        options: the run's options.
        metrics: the metrics.
        verifies: whether workers compare their models' files with the record, because they may be on other machines.
    """

    out: str
    models: Sequence[ModelSpec]
    labels: Sequence[str]
    texts: Sequence[Text]
    options: RunOptions
    metrics: Sequence[SelectedMetric]
    verifies: bool = False

    def as_json(self) -> str:
        """Return the job as one line of JSON.

        Raises:
            InputError: for a metric that another process cannot import.
        """
        values = {
            "out": self.out,
            "models": [[model.source, model.label, model.revision] for model in self.models],
            "labels": list(self.labels),
            "texts": [[text.id, text.text, text.label] for text in self.texts],
            "options": self.options.as_dict(),
            "metrics": [[reference_to(metric), metric.params.as_dict()] for metric in self.metrics],
            "verifies": self.verifies,
            "path": [str(Path(entry).resolve()) for entry in sys.path],
            "folder": os.getcwd(),
        }
        return json.dumps(values, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> WorkerJob:
        """Return the job in a line of JSON, after importing its metrics."""
        values = json.loads(text)
        with contextlib.suppress(
            OSError
        ):  # another machine may lack it; a relative path is then an error of its own
            os.chdir(values["folder"])
        sys.path += [entry for entry in values["path"] if entry not in sys.path]
        return cls(
            values["out"],
            [ModelSpec(*model) for model in values["models"]],
            values["labels"],
            [Text(*text) for text in values["texts"]],
            RunOptions(**values["options"]),
            select_metrics([(_metric(reference), params) for reference, params in values["metrics"]]),
            values["verifies"],
        )

    def sessions(self, observer: Observer) -> list[ModelSession]:
        """Return the models with their texts, none of them loaded."""
        return [
            ModelSession(model, label, self.texts, self.options, observer)
            for model, label in zip(self.models, self.labels, strict=True)
        ]


def require_specs(models: Sequence[object]) -> list[ModelSpec]:
    """Return the models if all are named by text; raise InputError otherwise."""
    specs = [model for model in models if isinstance(model, ModelSpec)]
    if len(specs) < len(models):
        raise InputError(
            "workers load the models themselves: name them by text, such as a checkpoint folder, instead of giving "
            "lenses, or leave workers out"
        )
    return specs


def reference_to(metric: SelectedMetric) -> dict[str, str]:
    """Return where another process finds a metric: a plugin's name, a file, or a class in a module.

    Raises:
        InputError: for a class that no other process can import.
    """
    if metric.is_plugin:
        origin = plugins().origin(metric.name)
        path = str(Path(origin.version).resolve()) if origin.distribution in _BY_PATH else ""
        return {"name": metric.name, origin.distribution if path else "": path}
    module, name = metric.metric.__module__, metric.metric.__qualname__
    if module == "__main__" or getattr(sys.modules.get(module), name, None) is not metric.metric:
        raise InputError(
            f"metric {metric.name!r} is the class {name} of {module}, which another process cannot import; put it at "
            "the top level of a module, or leave workers out"
        )
    return {"module": module, "class": name}


def _metric(reference: Mapping[str, str]) -> Any:
    if "module" in reference:
        return getattr(import_module(reference["module"]), reference["class"])
    name = reference["name"]
    if name not in plugins().added_names:
        if "file" in reference:
            plugins().add_file(reference["file"])
        elif "folder" in reference:
            plugins().add_folder(reference["folder"])
    return name
