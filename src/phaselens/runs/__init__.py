"""A run: models × metrics × texts, measured in one pass per model."""

from phaselens.runs.active_metrics import guarded
from phaselens.runs.comparability import DIFFERENCES
from phaselens.runs.comparison import Comparison, compare
from phaselens.runs.condition_editor import applied
from phaselens.runs.engine import feed_losses, feed_metric
from phaselens.runs.inputs import load_model
from phaselens.runs.label_groups import BY_LABEL, group_by_label
from phaselens.runs.measurement import run
from phaselens.runs.merging import merge
from phaselens.runs.observer import Observer
from phaselens.runs.planning import ModelPlan, PlannedPass, RunPlan, plan
from phaselens.runs.result import (
    SCHEMA,
    FailedShard,
    Failure,
    MetricResult,
    ModelFailure,
    ModelRecord,
    Run,
    TextRecord,
)
from phaselens.runs.run_options import DEFAULT_MODELS, ModelSpec, RunOptions, SelectedMetric, select_metrics
from phaselens.runs.run_summary import RunSummary, find_runs
from phaselens.runs.stored_run import open_run
from phaselens.runs.study_file import Study, read_study, require_measurable, shipped_studies
from phaselens.runs.study_result import StudyResult, run_study

__all__ = [
    "BY_LABEL",
    "DEFAULT_MODELS",
    "DIFFERENCES",
    "SCHEMA",
    "Comparison",
    "FailedShard",
    "Failure",
    "MetricResult",
    "ModelFailure",
    "ModelPlan",
    "ModelRecord",
    "ModelSpec",
    "Observer",
    "PlannedPass",
    "Run",
    "RunOptions",
    "RunPlan",
    "RunSummary",
    "SelectedMetric",
    "Study",
    "StudyResult",
    "TextRecord",
    "applied",
    "compare",
    "feed_losses",
    "feed_metric",
    "find_runs",
    "group_by_label",
    "guarded",
    "load_model",
    "merge",
    "open_run",
    "plan",
    "read_study",
    "require_measurable",
    "run",
    "run_study",
    "select_metrics",
    "shipped_studies",
]
