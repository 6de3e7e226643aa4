"""Reasons why two measurements cannot be compared: what differs between them besides the model."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from phaselens.errors import InputError, close_matches, is_list_like, short_form
from phaselens.runs.result import MetricResult, ModelRecord, Run

#: What can differ, by the name that `--allow` takes.
DIFFERENCES = {
    "texts": "other texts; those of the same id and content are compared",
    "labels": "other labels of texts, which matter with --by label; the first run's are used",
    "length": "texts cut at another length, or for one of the models only",
    "bos": "another BOS policy",
    "parameters": "other parameters of a metric, or another seed",
    "definitions": "another version of a metric",
    "precision": "another dtype or quantisation",
    "numerics": "other versions of torch, transformers or phaselens, another device or attention path",
}


@dataclass(frozen=True)
class Obstacle:
    """One difference that makes numbers incomparable; `name` is a key of `DIFFERENCES`."""

    name: str
    message: str

    def __str__(self) -> str:
        return f"{self.name}: {self.message}"


def require_comparable(obstacles: Collection[Obstacle], allowed: Collection[str]) -> list[str]:
    """Return the differences that are allowed, each as `NAME: message`.

    Raises:
        InputError: for a difference that is not allowed, or a name that is none of `DIFFERENCES`.
    """
    if not is_list_like(allowed):
        raise InputError(f"expected allow as a list of names, received {short_form(allowed)}")
    for name in allowed:
        if not isinstance(name, str) or name not in DIFFERENCES:
            raise InputError(f"allow: {name!r} is not a difference; {close_matches(str(name), DIFFERENCES)}")
    refused = [obstacle for obstacle in obstacles if obstacle.name not in allowed]
    if refused:
        names = list(dict.fromkeys(obstacle.name for obstacle in refused))
        options = " ".join(f"--allow {name}" for name in names)
        raise InputError(
            f"not comparable: {'; '.join(map(str, refused))} ({options} compares them nevertheless)"
        )
    return [str(obstacle) for obstacle in obstacles]


def obstacles_of_texts(first: Run, second: Run) -> Iterator[Obstacle]:
    """Yield how the runs' texts and their lengths differ."""
    first_texts, second_texts = ({text.id: text.sha256 for text in run.texts} for run in (first, second))
    differing = [
        name for name in first_texts | second_texts if first_texts.get(name) != second_texts.get(name)
    ]
    if differing:
        n_texts = len(first_texts | second_texts)
        yield Obstacle(
            "texts",
            f"{len(differing)} of {n_texts} texts are not in both runs with the same content, such as {differing[0]!r}",
        )
    limits = [run.options.get("max_tokens") for run in (first, second)]
    if limits[0] != limits[1] and any(
        any(text.cut.values()) for run in (first, second) for text in run.texts
    ):
        yield Obstacle("length", f"texts were cut to {limits[0]} and to {limits[1]} tokens")


def obstacles_of_labels(first: Run, second: Run) -> Iterator[Obstacle]:
    """Yield which texts have another label in the second run."""
    labels = {text.id: text.label for text in second.texts}
    differing = [text.id for text in first.texts if labels.get(text.id, text.label) != text.label]
    if differing:
        yield Obstacle(
            "labels", f"{len(differing)} texts have another label in the second run, such as {differing[0]!r}"
        )


def obstacles_of_options(first: Run, second: Run) -> Iterator[Obstacle]:
    """Yield how the runs' seeds and the versions that measured them differ."""
    seeds = [run.options.get("seed") for run in (first, second)]
    if seeds[0] != seeds[1]:
        yield Obstacle("parameters", f"the seed is {seeds[0]} in one run and {seeds[1]} in the other")
    versions = [run.versions.get("phaselens") for run in (first, second)]
    if versions[0] != versions[1]:
        yield Obstacle("numerics", f"the runs were measured with phaselens {versions[0]} and {versions[1]}")


def obstacles_of_cuts(runs: tuple[Run, Run], labels: tuple[str, str]) -> Iterator[Obstacle]:
    """Yield which texts were cut for one model only: the models have read different parts of them."""
    cut_first, cut_second = (
        {text.id: bool(text.cut.get(label)) for text in run.texts}
        for run, label in zip(runs, labels, strict=True)
    )
    differing = [name for name in cut_first.keys() & cut_second.keys() if cut_first[name] != cut_second[name]]
    if differing:
        texts = "1 text was" if len(differing) == 1 else f"{len(differing)} texts were"
        yield Obstacle(
            "length", f"{texts} cut for one of {labels[0]} and {labels[1]} only, such as {min(differing)!r}"
        )


def obstacles_of_models(first: ModelRecord, second: ModelRecord) -> Iterator[Obstacle]:
    """Yield how the protocols of two models differ."""
    labels = f"{first.info.label} and {second.info.label}"
    if first.bos != second.bos or first.starts_with_bos != second.starts_with_bos:
        policies = [
            f"bos {model.bos}{'' if model.starts_with_bos else ', no BOS at position 0'}"
            for model in (first, second)
        ]
        yield Obstacle("bos", f"{labels} were measured with {policies[0]} and with {policies[1]}")
    for name, title in (("dtype", "dtype"), ("quantisation", "quantisation")):
        values = [getattr(model.info, name) for model in (first, second)]
        if values[0] != values[1]:
            yield Obstacle("precision", f"{labels} have {title} {values[0]} and {values[1]}")
    devices = [model.info.device.partition(":")[0] for model in (first, second)]
    if devices[0] != devices[1]:
        yield Obstacle("numerics", f"{labels} were measured on {devices[0]} and on {devices[1]}")
    paths = [model.info.attention_path for model in (first, second)]
    if paths[0] != paths[1]:
        yield Obstacle(
            "numerics", f"the attention of {labels} was computed by {paths[0]!r} and by {paths[1]!r}"
        )
    for package in ("torch", "transformers"):
        versions = [model.info.versions.get(package) for model in (first, second)]
        if versions[0] != versions[1]:
            yield Obstacle(
                "numerics", f"{labels} were measured with {package} {versions[0]} and {versions[1]}"
            )


def obstacles_of_metric(name: str, first: MetricResult, second: MetricResult) -> Iterator[Obstacle]:
    """Yield how a metric's versions and parameters differ."""
    versions = [f"{result.metric.version} ({result.distribution})" for result in (first, second)]
    if versions[0] != versions[1]:
        yield Obstacle(
            "definitions", f"{name} is version {versions[0]} in one run and {versions[1]} in the other"
        )
    parameters = [result.params.as_dict() for result in (first, second)]
    for parameter in parameters[0] | parameters[1]:
        values = [values.get(parameter) for values in parameters]
        if values[0] != values[1]:
            yield Obstacle(
                "parameters", f"{name}.{parameter} is {values[0]!r} in one run and {values[1]!r} in the other"
            )
