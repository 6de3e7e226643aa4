"""Errors of transformers about a config, in words that name the field, its value and what it should be."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from phaselens.errors import ModelError, PhaseLensError
from phaselens.lens.declared_values import as_json
from phaselens.lens.model_source import ModelSource
from phaselens.lens.pretrained import one_line, quiet_transformers

_FIX = "fix it, or fetch the config again"
_JSON_NAMES = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "list": "a list",
               "dict": "an object", "NoneType": "null"}  # fmt: skip
_TYPE_NAME = re.compile(r"\b(?:list\[\w+\]|int|float|bool|str|list|dict|NoneType)")


@contextmanager
def explaining_config(source: ModelSource) -> Iterator[None]:
    """Turn what transformers raises about the config of a checkpoint folder into an error that names the field.

    Raises:
        ModelError: for a config that is the cause; errors with another cause pass.
    """
    try:
        yield
    except (PhaseLensError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        path = None if source.folder is None else source.folder / "config.json"
        if path is None or not path.is_file():
            raise
        explained = _config_error(error, json.loads(path.read_text(encoding="utf-8")), source.name)
        if explained is None:
            raise
        raise explained from error


def require_shapes(mismatched: Collection[tuple[str, Sequence[int], Sequence[int]]], model_name: str) -> None:
    """Raise ModelError for tensors whose shapes in the checkpoint and in the model differ, with those of the first."""
    if mismatched:
        tensor, stored, declared = min(mismatched)
        raise ModelError(
            f"model {model_name!r}: {len(mismatched)} of its weights have other shapes than its config.json says "
            f"(first: {tensor}, {list(stored)} in the weights and {list(declared)} by the config); take both from one "
            "checkpoint"
        )


def _config_error(error: Exception, config: Mapping[str, Any], model_name: str) -> ModelError | None:
    """Return what is wrong with a config that transformers cannot use; None where the config is not the cause.

    Args:
        error: what transformers raised.
        config: the content of config.json.
        model_name: the model's name in messages.
    """
    start = f"model {model_name!r}: config.json has"
    text = " ".join(str(error).split())
    wrong_type = re.search(r"Field '(\w+)' (expected|with value .*? doesn't match any type in) (.*)", text)
    if wrong_type:
        field, _, types = wrong_type.groups()
        expected = _in_words(types.split(", got ")[0].split("). Errors")[0])
        return ModelError(
            f"{start} {field} {as_json(_value(config, field))}; it should be {expected}; {_FIX}"
        )
    wrong_class = re.search(r"Class validation error for validator '\w+': \w+: (.*)", text)
    if wrong_class:
        return ModelError(f"{start} fields that contradict each other: {_shortened(wrong_class[1])}; {_FIX}")
    if "does not recognize this architecture" in text:
        return ModelError(
            f"{start} model_type {as_json(config.get('model_type'))}, which this version of transformers does not "
            "know; use a model type that docs/families.md lists as served, or a newer transformers"
        )
    field = _field_at_fault(config)
    if field is None:
        return None
    return ModelError(
        f"{start} {field} {as_json(config[field])}, with which transformers cannot build a model of type "
        f"{as_json(config.get('model_type'))} ({type(error).__name__}: {one_line(error)}); {_FIX}"
    )


def _in_words(types: str) -> str:
    names = list(dict.fromkeys(match.split("[")[0] for match in _TYPE_NAME.findall(types)))
    if "float" in names:
        names = [name for name in names if name != "int"]
    return " or ".join(_JSON_NAMES[name] for name in names) or f"a {types}"


def _value(config: Mapping[str, Any], field: str) -> object:
    """Return the value of a field, which may be that of a nested section."""
    if field in config:
        return config[field]
    sections = (value for value in config.values() if isinstance(value, dict))
    return next((section[field] for section in sections if field in section), None)


def _shortened(text: str) -> str:
    return text.rstrip(".") if len(text) <= 160 else f"{text[:159]}…"


def _field_at_fault(config: Mapping[str, Any]) -> str | None:
    """Return the field without which a model can be built; None if one can be built with it, or without none."""
    if "model_type" not in config or _can_build(config):
        return None
    for field in config:
        if field != "model_type" and _can_build({name: config[name] for name in config if name != field}):
            return field
    return None


def _can_build(config: Mapping[str, Any]) -> bool:
    """Return whether transformers can build a model from this config, on a device without memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with quiet_transformers(), torch.device("meta"):
            ignored = ("auto_map", "quantization_config")
            # transformers writes into the values.
            settings = copy.deepcopy({name: value for name, value in config.items() if name not in ignored})
            AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    except Exception:  # noqa: BLE001 - a config with impossible values raises whatever they lead to
        return False
    return True
