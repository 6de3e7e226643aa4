"""What determines the numbers of a run: recorded in `run.json`, and compared when the run is continued."""

from __future__ import annotations

import hashlib
import inspect
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from phaselens.data import Text
from phaselens.plugin import TableSpec
from phaselens.runs.model_description import ModelDescription, as_json
from phaselens.runs.model_session import ModelSession
from phaselens.runs.run_options import ModelSpec, RunOptions, SelectedMetric

#: Packages whose version can change a number.
_PACKAGES = ("phaselens", "torch", "transformers", "transformer-lens", "numpy", "scipy")


def record_request(
    sessions: Sequence[ModelSession],
    texts: Sequence[Text],
    selected_metrics: Sequence[SelectedMetric],
    options: RunOptions,
) -> dict[str, Any]:
    """Return everything that determines the numbers and is known before a model is loaded, as plain JSON values.

    A model that does not come from files is loaded for the digest of its weights.
    """
    return {
        "models": {session.label: _model_request(session) for session in sessions},
        "texts": [{"id": text.id, "sha256": text.sha256, "label": text.label} for text in texts],
        "metrics": {selected.name: _metric_request(selected) for selected in selected_metrics},
        "options": {**options.as_dict(), "device": _device_type(options.device)},
        "versions": {name: metadata.version(name) for name in _PACKAGES},
    }


def _model_request(session: ModelSession) -> dict[str, Any]:
    from phaselens.lens.fingerprints import file_digests, weights_digest

    if isinstance(session.model, ModelSpec):
        source = session.model.identified
        files = None if session.is_of_plugin else file_digests(source)
        if files is None and not session.is_of_plugin:
            session.lens  # noqa: B018 - a hub id, which loading fetches
            files = file_digests(source)
        if files:
            return {"revision": session.model.revision, "files": files}
        return {"revision": session.model.revision, "weights": weights_digest(session.lens)}
    info = session.lens.info
    return {
        "weights": weights_digest(session.lens),
        "files": info.files,
        "positions": list(info.positions),
        "dtype": info.dtype,
        "device": info.device.partition(":")[0],
        "bos": info.bos,
    }


def _metric_request(selected: SelectedMetric) -> dict[str, Any]:
    return {
        "version": selected.metric.version,
        "distribution": selected.distribution,
        "code": None if _is_installed(selected) else _code_digest(selected.metric),
        "params": selected.params.as_dict(),
    }


def _is_installed(selected: SelectedMetric) -> bool:
    name = selected.distribution.rpartition(" ")[0]
    try:
        metadata.version(name)
    except (metadata.PackageNotFoundError, ValueError):
        return False
    return True


def _code_digest(metric: type) -> str | None:
    """Return the sha256 of the file that defines a metric without a distribution; None where there is no file."""
    try:
        file = inspect.getsourcefile(metric)
        return None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()
    except (OSError, TypeError):
        return None


def _device_type(device: str) -> str:
    from phaselens.lens.checkpoints import resolve_device

    return resolve_device(device).type


def differences(recorded: Mapping[str, Any], request: Mapping[str, Any]) -> list[str]:
    """Return in words what differs between a recorded request and another one; empty if they are the same."""
    return [
        *_option_differences(recorded["options"], request["options"]),
        *_text_differences(recorded["texts"], request["texts"]),
        *_metric_differences(recorded["metrics"], request["metrics"]),
        *_model_differences(recorded["models"], request["models"]),
        *(
            f"version of {name}: {recorded['versions'].get(name)}, now {version}"
            for name, version in request["versions"].items()
            if recorded["versions"].get(name) != version
        ),
    ]


def metric_differences(request: Mapping[str, Any], selected_metrics: Sequence[SelectedMetric]) -> list[str]:
    """Return in words what differs between the metrics and packages of a recorded request and those installed here."""
    installed = {name: metadata.version(name) for name in _PACKAGES}
    return [
        *_metric_differences(
            request["metrics"], {selected.name: _metric_request(selected) for selected in selected_metrics}
        ),
        *(
            f"version of {name}: {version}, here {installed.get(name)}"
            for name, version in request["versions"].items()
            if installed.get(name) != version
        ),
    ]


def _option_differences(recorded: Mapping[str, Any], request: Mapping[str, Any]) -> Iterator[str]:
    for name, value in request.items():
        if name != "n_texts" and recorded.get(name) != value:  # texts are compared one by one
            yield f"--{name.replace('_', '-')}: {recorded.get(name)}, now {value}"


def _text_differences(recorded: Sequence[Any], request: Sequence[Any]) -> Iterator[str]:
    if len(recorded) != len(request):
        yield f"number of texts: {len(recorded)}, now {len(request)}"
    changed = [text["id"] for before, text in zip(recorded, request, strict=False) if before != text]
    if changed:
        yield f"{len(changed)} texts have changed (first: {changed[0]!r})"


def _metric_differences(recorded: Mapping[str, Any], request: Mapping[str, Any]) -> Iterator[str]:
    yield from _names_differ("metrics", list(recorded), list(request))
    for name in recorded.keys() & request.keys():
        before, now = recorded[name], request[name]
        for parameter, value in now["params"].items():
            if before["params"].get(parameter) != value:
                yield f"{name}.{parameter}: {before['params'].get(parameter)}, now {value}"
        for field in ("version", "distribution"):
            if before[field] != now[field]:
                yield f"{field} of metric {name}: {before[field]}, now {now[field]}"
        if before["code"] != now["code"]:
            yield f"the file of metric {name} has changed"


def _model_differences(recorded: Mapping[str, Any], request: Mapping[str, Any]) -> Iterator[str]:
    yield from _names_differ("models", list(recorded), list(request))
    for label in recorded.keys() & request.keys():
        before, now = recorded[label], request[label]
        files_before, files_now = before.get("files") or {}, now.get("files") or {}
        for file in sorted(files_before.keys() | files_now.keys()):
            if files_before.get(file) != files_now.get(file):
                yield f"file {file} of model {label} has changed"
        for field in sorted((before.keys() | now.keys()) - {"files"}):
            if before.get(field) != now.get(field):
                yield f"{field} of model {label}: {before.get(field)}, now {now.get(field)}"


def _names_differ(kind: str, recorded: list[str], request: list[str]) -> Iterator[str]:
    if recorded != request:
        yield f"{kind}: {', '.join(recorded)}, now {', '.join(request)}"


def record_run(
    request: Mapping[str, Any],
    descriptions: Mapping[str, ModelDescription],
    selected_metrics: Sequence[SelectedMetric],
    *,
    options: Mapping[str, Any],
    versions: Mapping[str, str],
    notes: Sequence[str],
    command: Sequence[str] | None,
) -> dict[str, Any]:
    """Return the whole record of a run as plain JSON values.

    `request` is what `record_request` returned; `options` and `versions` are those of the `Run`; `notes` are about the
    texts.
    """
    n_tokens = {label: description.n_tokens for label, description in descriptions.items()}
    return {
        "command": None if command is None else list(command),
        "times": {"started": now()},
        "models": [
            description.as_dict() | {"hashes": request["models"][label]}
            for label, description in descriptions.items()
        ],
        "texts": [
            text | {"n_tokens": {label: tokens[index] for label, tokens in n_tokens.items()}}
            for index, text in enumerate(request["texts"])
        ],
        "metrics": {selected.name: _metric_record(selected) for selected in selected_metrics},
        "options": dict(options),
        "seeds": {"seed": options["seed"]},
        "versions": dict(versions) | {"plugins": _plugin_versions(selected_metrics)},
        "device": _device(),
        "notes": list(notes),
        "request": request,
    }


def now() -> str:
    """Return the time, in UTC and ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _metric_record(selected: SelectedMetric) -> dict[str, Any]:
    metric = selected.metric
    return {
        **_metric_request(selected),
        "title": metric.title,
        "description": metric.description,
        "citation": metric.citation,
        "definition": metric.define(selected.params) if _is_defined(selected) else "",
        "tables": [_table_record(spec) for spec in metric.tables],
        "display": as_json(metric.display),
        "figure_panels": as_json(metric.figure_panels),
        "causal": hasattr(metric, "conditions"),
        "prints": metric.prints,
        "plots": metric.plots,
    }


def _table_record(spec: TableSpec) -> dict[str, Any]:
    columns = [
        {"name": column.name, "type": column.type.__name__, "unit": column.unit, "help": column.help}
        for column in spec.columns
    ]
    return {"name": spec.name, "help": spec.help, "columns": columns}


def _is_defined(selected: SelectedMetric) -> bool:
    from phaselens.plugin.author_errors import is_of_plugin

    try:
        return isinstance(selected.metric.define(selected.params), str)
    except BaseException as error:  # every model records the failure
        if not is_of_plugin(error):
            raise
        return False


def _plugin_versions(selected_metrics: Sequence[SelectedMetric]) -> dict[str, str]:
    versions = {}
    for selected in selected_metrics:
        if _is_installed(selected):
            name, _, version = selected.distribution.rpartition(" ")
            versions[name] = version
    return versions


def _device() -> dict[str, Any]:
    """Return the machine, for people: two machines can differ in the last bits."""
    import torch

    cuda = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "machine": platform.machine(),
        # Not platform.platform(), which starts a process to find the processor.
        "system": f"{platform.system()}-{platform.release()}",
        "host": platform.node(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": cuda,
    }
