"""A run: models × metrics × texts, measured in one pass a model."""

from phaselens.runs.api import run
from phaselens.runs.engine import gather, gather_losses
from phaselens.runs.interventions import applied
from phaselens.runs.options import DEFAULT_MODELS, Chosen, ModelSpec, Options, choose
from phaselens.runs.result import SCHEMA, Failure, MetricResult, ModelFailure, ModelRecord, Run, TextRecord
from phaselens.runs.sources import load_model
from phaselens.runs.work import Observer, guarded

__all__ = [
    "DEFAULT_MODELS",
    "SCHEMA",
    "Chosen",
    "Failure",
    "MetricResult",
    "ModelFailure",
    "ModelRecord",
    "ModelSpec",
    "Observer",
    "Options",
    "Run",
    "TextRecord",
    "applied",
    "choose",
    "gather",
    "gather_losses",
    "guarded",
    "load_model",
    "run",
]
