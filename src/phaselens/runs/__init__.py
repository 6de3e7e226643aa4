"""A run: models × metrics × texts, measured in one pass a model."""

from phaselens.runs.api import run
from phaselens.runs.engine import Observer, gather, guarded
from phaselens.runs.options import DEFAULT_MODELS, Chosen, ModelSpec, Options, choose
from phaselens.runs.result import SCHEMA, Failure, MetricResult, ModelRecord, Run, TextRecord
from phaselens.runs.sources import load_model

__all__ = [
    "DEFAULT_MODELS",
    "SCHEMA",
    "Chosen",
    "Failure",
    "MetricResult",
    "ModelRecord",
    "ModelSpec",
    "Observer",
    "Options",
    "Run",
    "TextRecord",
    "choose",
    "gather",
    "guarded",
    "load_model",
    "run",
]
