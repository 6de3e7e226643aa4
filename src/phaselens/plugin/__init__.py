"""The public API for metrics.

    from phaselens.plugin import Column, LayerView, Metric, Params, TableSpec, hookimpl, param

A plugin is a module named by an entry point of the group `phaselens`. The entry point's name is the name of what it
offers, most often of a metric; the module implements hooks such as `phaselens_metrics()`. This package imports no
torch; nor should a plugin's module at its top level.
"""

from phaselens.data import Encoder, Text
from phaselens.errors import InputError
from phaselens.lens.info import ModelInfo, Rotation
from phaselens.lens.projection import Projection
from phaselens.plugin.causal import CausalMetric
from phaselens.plugin.causal_tables import CAUSAL_TABLES, CausalTables
from phaselens.plugin.conditions import BASELINE, Condition, Edit, Outcome, Prompt, Site
from phaselens.plugin.hookspecs import FinishedRun, hookimpl
from phaselens.plugin.losses import Losses, Proof
from phaselens.plugin.manager import Plugins, plugins
from phaselens.plugin.metric import Display, Metric, require_metric
from phaselens.plugin.offers import NamedModel, NamedTexts
from phaselens.plugin.params import Params, ParamSpec, param
from phaselens.plugin.registry import Registered
from phaselens.plugin.tables import MODEL, Cell, Column, Table, TableSpec, interval_help
from phaselens.plugin.views import Batch, LayerView, PerText

__all__ = [
    "BASELINE",
    "CAUSAL_TABLES",
    "MODEL",
    "Batch",
    "CausalMetric",
    "CausalTables",
    "Cell",
    "Column",
    "Condition",
    "Display",
    "Edit",
    "Encoder",
    "FinishedRun",
    "InputError",
    "LayerView",
    "Losses",
    "Metric",
    "ModelInfo",
    "NamedModel",
    "NamedTexts",
    "Outcome",
    "ParamSpec",
    "Params",
    "PerText",
    "Plugins",
    "Projection",
    "Prompt",
    "Proof",
    "Registered",
    "Rotation",
    "Site",
    "Table",
    "TableSpec",
    "Text",
    "hookimpl",
    "interval_help",
    "param",
    "plugins",
    "require_metric",
]
