"""What made a run, as the report's last section shows it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phaselens.errors import InputError
from phaselens.report.strings import printable
from phaselens.runs import Run
from phaselens.runs.run_directory import RunDirectory

_DIGITS_OF_HASH = 12


@dataclass(frozen=True)
class Provenance:
    """The command, and lists of (name, value): the run, its options, its versions, and one list for each model."""

    command: str
    facts: Sequence[tuple[str, str]]
    options: Sequence[tuple[str, str]]
    versions: Sequence[tuple[str, str]]
    models: Sequence[tuple[str, Sequence[tuple[str, str]]]]


def provenance(run: Run, command: Sequence[str] | None) -> Provenance:
    """Return what made the run; the record in its directory says more than the run in memory."""
    record = _record(run)
    words = command if command is not None else record.get("command")
    times, device = record.get("times", {}), record.get("device", {})
    facts = [
        ("started", times.get("started")),
        ("device", ", ".join(dict.fromkeys(model.info.device for model in run.models))),
        ("machine", device.get("system")),
        ("GPU", ", ".join(device.get("cuda", []))),
        ("texts", f"{len(run.texts):,}"),
        ("digest of the texts", _digest(run)),
        ("directory", None if run.directory is None else run.directory.name),
    ]
    return Provenance(
        "" if words is None else printable(shlex.join(words)),
        _shown(facts),
        _shown([(name, value) for name, value in run.options.items() if value not in (None, {}, [])]),
        _shown([*(run.versions | record.get("versions", {}).get("plugins", {})).items()]),
        [(printable(model.info.label), _model_facts(model.as_dict())) for model in run.models],
    )


def _record(run: Run) -> dict[str, Any]:
    if run.directory is None:
        return {}
    try:
        return RunDirectory(run.directory).read_record()
    except InputError:  # the run in memory is complete without it
        return {}


def _digest(run: Run) -> str:
    """Return a digest of the texts' hashes, which tells whether two runs read the same texts."""
    from phaselens.runs.shards import digest_of

    return digest_of([text.sha256 for text in run.texts])[:_DIGITS_OF_HASH]


def _model_facts(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    positions = list(dict.fromkeys(model["positions"]))
    shape = (
        f"{model['n_layers']} layers, {model['n_heads']} heads of {model['d_head']}, width {model['d_model']}"
    )
    files = {
        f"sha256 of {name}": str(digest)[:_DIGITS_OF_HASH]
        for name, digest in (model.get("files") or {}).items()
    }
    return _shown(
        [
            ("source", model["source"]),
            ("revision", model.get("revision")),
            ("architecture", model.get("architecture")),
            ("shape", shape),
            ("positions", ", ".join(map(str, positions))),
            ("dtype", model["dtype"]),
            ("quantisation", model.get("quantisation")),
            ("adapter", model.get("adapter")),
            ("attention", model.get("attention_path")),
            ("BOS", model.get("bos")),
            ("tokens", f"{model['n_tokens']:,}"),
            ("protocol", model.get("protocol")),
            *files.items(),
        ]
    )


def _shown(pairs: Sequence[tuple[str, Any]]) -> list[tuple[str, str]]:
    return [
        (
            printable(str(name)),
            printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)),
        )
        for name, value in pairs
        if value not in (None, "", "null")
    ]
