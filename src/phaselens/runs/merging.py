"""Make the tables of a run whose parts were computed by several processes."""

from __future__ import annotations

import os

from phaselens.data import Text
from phaselens.errors import InputError, require_flag
from phaselens.plugin import plugins
from phaselens.runs.model_description import ModelDescription
from phaselens.runs.model_session import ModelSession
from phaselens.runs.observer import Observer
from phaselens.runs.parts import MergingCrew
from phaselens.runs.result import MetricResult, Run, TextRecord
from phaselens.runs.resumable import ResumableRun
from phaselens.runs.run_directory import RunDirectory
from phaselens.runs.run_options import ModelSpec, RunOptions, select_metrics
from phaselens.runs.run_record import metric_differences
from phaselens.runs.stored_run import open_run
from phaselens.runs.threads import fixed_threads


def merge(path: str | os.PathLike[str], *, allow_missing: bool = False) -> Run:
    """Merge the shards in a run's directory, write its tables, and return the run. No model is loaded.

    Args:
        path: the directory, of `phaselens run --shards … --out DIR`, or of a run that was interrupted.
        allow_missing: leave out shards that no part has computed; the run's `failed_shards` names them.

    Returns:
        The run. If it was merged before, it is read.

    Raises:
        InputError: for a directory without a run, shards that are missing, and metrics that are not installed in the
            versions of the record.
    """
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"expected path as the directory of a run, received {type(path).__name__}")
    require_flag("allow_missing", allow_missing)
    directory = RunDirectory(path)
    record = directory.read_record()
    if directory.is_complete and not directory.lacks_shards:
        return open_run(path)
    request = record["request"]
    options = RunOptions(**request["options"])
    selected = select_metrics([(name, metric["params"]) for name, metric in request["metrics"].items()])
    changed = metric_differences(request, selected)
    if changed:
        raise InputError(
            f"the run in {str(directory.path)!r} was measured with something else: {'; '.join(changed)}; merge it "
            "where it was measured"
        )
    # Their content is not needed any more; their ids and hashes are.
    texts = [Text(text["id"], "", text["label"]) for text in record["texts"]]
    descriptions = [ModelDescription.from_dict(model) for model in record["models"]]
    sessions = [
        ModelSession(
            ModelSpec(description.record.info.label),
            description.record.info.label,
            texts,
            options,
            Observer(),
        )
        for description in descriptions
    ]
    results = {
        metric.name: MetricResult(metric.metric, metric.params, metric.distribution) for metric in selected
    }
    versions = {name: version for name, version in record["versions"].items() if name != "plugins"}
    records = [TextRecord(text["id"], text["sha256"], label=text["label"]) for text in record["texts"]]
    result = Run([], records, results, list(record["notes"]), dict(record["options"]), versions)
    failures = directory.read_failed_shards()
    crew = MergingCrew(str(directory.path), failures, allow_missing=allow_missing)
    resumable = ResumableRun(directory, sessions, selected, options, texts, crew)
    resumable.adopt()
    with fixed_threads(options.threads or 1):
        resumable.measure(result, Observer())
    result.directory = directory.path
    used_plugins = [metric.name for metric in selected if metric.is_plugin]
    result.warnings.extend(plugins().notify_run_finished(result.copy(), used_plugins))
    resumable.finish(result)
    return result
