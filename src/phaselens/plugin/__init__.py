"""The public API for metrics.

    from phaselens.plugin import Column, LayerView, Metric, Params, TableSpec, hookimpl, param

A plugin is a module named by an entry point of the group `phaselens`. The entry point's name is the name of what it
offers, usually a metric; the module implements hooks such as `phaselens_metrics()`. This package does not import torch,
and a plugin's module should not import it at its top level.
"""

from phaselens.data import Encoder, Text
from phaselens.errors import InputError
from phaselens.lens.info import ModelInfo, RotatedPairs
from phaselens.lens.points import in_layer
from phaselens.lens.projection import Projection
from phaselens.plugin.adjusted_p import ADJUSTED_P, with_adjusted_p
from phaselens.plugin.causal_metric import CausalMetric, kind_of
from phaselens.plugin.causal_tables import CAUSAL_TABLES, CausalTables
from phaselens.plugin.condition_losses import EditEffect, Losses
from phaselens.plugin.conditions import (
    BASELINE,
    Condition,
    ConditionKey,
    Edit,
    Site,
    TaskPrompt,
    TextOutcome,
)
from phaselens.plugin.display import Display, FigurePanel, FigureSet
from phaselens.plugin.hookspecs import FinishedRun, hookimpl
from phaselens.plugin.intervals import interval_columns, mean_intervals
from phaselens.plugin.manager import Plugins, plugins
from phaselens.plugin.metric import Metric, require_metric
from phaselens.plugin.named_sources import NamedModel, NamedTexts
from phaselens.plugin.params import Params, ParamSpec, param
from phaselens.plugin.registry import RegisteredPlugin
from phaselens.plugin.report_section import ReportSection
from phaselens.plugin.sequences import TokenSequence
from phaselens.plugin.state_codec import DamagedState
from phaselens.plugin.state_files import read_state, write_state
from phaselens.plugin.states import NestedState
from phaselens.plugin.tables import MODEL, CellValue, Column, Table, TableSpec, interval_help
from phaselens.plugin.views import Batch, LayerView, PerText
from phaselens.plugin.warning import TOO_FEW_TEXTS, MetricWarning

__all__ = [
    "ADJUSTED_P",
    "BASELINE",
    "CAUSAL_TABLES",
    "MODEL",
    "TOO_FEW_TEXTS",
    "Batch",
    "CausalMetric",
    "CausalTables",
    "CellValue",
    "Column",
    "Condition",
    "ConditionKey",
    "DamagedState",
    "Display",
    "Edit",
    "EditEffect",
    "Encoder",
    "FigurePanel",
    "FigureSet",
    "FinishedRun",
    "InputError",
    "LayerView",
    "Losses",
    "Metric",
    "MetricWarning",
    "ModelInfo",
    "NamedModel",
    "NamedTexts",
    "NestedState",
    "ParamSpec",
    "Params",
    "PerText",
    "Plugins",
    "Projection",
    "RegisteredPlugin",
    "ReportSection",
    "RotatedPairs",
    "Site",
    "Table",
    "TableSpec",
    "TaskPrompt",
    "Text",
    "TextOutcome",
    "TokenSequence",
    "hookimpl",
    "in_layer",
    "interval_columns",
    "interval_help",
    "kind_of",
    "mean_intervals",
    "param",
    "plugins",
    "read_state",
    "require_metric",
    "with_adjusted_p",
    "write_state",
]
