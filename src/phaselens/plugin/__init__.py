"""The public API for metrics.

    from phaselens.plugin import Column, LayerView, Metric, Params, TableSpec, hookimpl, param

A plugin is a module named by an entry point of the group `phaselens` (the entry point's name is the
metric's); it implements `phaselens_metrics()`. This package imports no torch; nor should a plugin's
module at its top level.
"""

from phaselens.lens.info import ModelInfo
from phaselens.plugin.hookspecs import FinishedRun, hookimpl
from phaselens.plugin.manager import Plugins, Registered, plugins
from phaselens.plugin.metric import Display, Metric, require_metric
from phaselens.plugin.params import Params, ParamSpec, param
from phaselens.plugin.tables import MODEL, Cell, Column, Table, TableSpec
from phaselens.plugin.views import Batch, LayerView, PerText

__all__ = [
    "MODEL",
    "Batch",
    "Cell",
    "Column",
    "Display",
    "FinishedRun",
    "LayerView",
    "Metric",
    "ModelInfo",
    "ParamSpec",
    "Params",
    "PerText",
    "Plugins",
    "Registered",
    "Table",
    "TableSpec",
    "hookimpl",
    "param",
    "plugins",
    "require_metric",
]
