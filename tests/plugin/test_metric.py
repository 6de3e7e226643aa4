"""What a Metric class must define and what it inherits."""

import json
import pickle
from collections.abc import Mapping, Sequence

import pytest
import torch

import phaselens
from phaselens.plugin import (
    TOO_FEW_TEXTS,
    Column,
    Display,
    FigurePanel,
    FigureSet,
    LayerView,
    Metric,
    Params,
    Table,
    TableSpec,
    require_metric,
)
from tests.plugins.views import info, view
from tests.toys import letters, toy_lens


class Complete(Metric[Params]):
    name = "whole"
    version = "1"
    tables = (TableSpec("summary", (Column("value"),)),)

    def hooks(self) -> Sequence[str]:
        return ["hook_embed"]

    def update(self, layer: LayerView) -> None: ...

    def compute(self) -> Mapping[str, Table]:
        return {}


def test_a_complete_metric_is_accepted() -> None:
    assert require_metric(Complete, "here") is Complete


def test_the_error_names_what_is_missing() -> None:
    class Unfinished(Metric[Params]):
        name = "unfinished"
        version = "1"
        tables = ()

    class Unnamed(Complete):
        name = None  # type: ignore[assignment]

    with pytest.raises(TypeError, match="here: Unfinished does not define compute, hooks, update"):
        require_metric(Unfinished, "here")
    with pytest.raises(TypeError, match="here: Unnamed sets no `name`"):
        require_metric(Unnamed, "here")
    with pytest.raises(TypeError, match="here: 'sinks' is not a subclass"):
        require_metric("sinks", "here")


def test_a_merged_metric_has_the_warnings_of_both() -> None:
    """The metric's own warnings come first, and none is repeated."""

    class WarnsByLayer(Complete):
        def update(self, layer: LayerView) -> None:
            self.warn(f"missing in layer {layer.index}")

    def measured(*layers: int) -> Metric[Params]:
        metric = WarnsByLayer(info(n_layers=4), Params())
        for index in layers:
            metric.update(view({"hook_resid_pre": torch.zeros(1, 2, 8)}, (2,), index))
        return metric

    first, second = measured(2, 0), measured(1, 2, 3)
    first.merge(second)
    assert first.warnings == [f"missing in layer {index}" for index in (2, 0, 1, 3)]
    assert second.warnings == [f"missing in layer {index}" for index in (1, 2, 3)]


def test_a_table_is_built_from_its_declaration() -> None:
    assert Complete.table("summary", [(1.5,)]).rows == [(1.5,)]
    with pytest.raises(KeyError, match="whole declares no table 'layers'"):
        Complete.table("layers", [])


def test_a_display_of_a_missing_column_is_refused() -> None:
    class Showing(Complete):
        tables = (TableSpec("layers", (Column("layer", int), Column("value"))),)

    Showing.display = Display(value="value", title="value")
    assert require_metric(Showing, "here") is Showing
    for display, message in (
        (Display(value="vlaue", title=""), "table layers has no column vlaue"),
        (Display(value="value", title="", null="null"), "table layers has no column null"),
        (Display(value="value", title="", table="other"), "table other has no column layer"),
        (Display(value="value", title="", summary=(("mean", "mean"),)), "table summary has no column mean"),
        (Display(value="value", title="", by_head="value"), "table heads has no column head"),
    ):
        Showing.display = display
        with pytest.raises(TypeError, match=f"here: the display of Showing: {message}"):
            require_metric(Showing, "here")


def test_the_columns_of_a_display_are_checked_in_the_table_of_heads_too() -> None:
    class ShowingHeads(Complete):
        tables = (TableSpec("heads", (Column("layer", int), Column("head", int), Column("value"))),)
        display = Display(value="vlaue", title="", table="heads", by_head="value")

    with pytest.raises(TypeError, match="table heads has no column vlaue"):
        require_metric(ShowingHeads, "here")


def test_a_warning_keeps_its_code_through_merging_and_pickling() -> None:
    first, second = Complete(info(), Params()), Complete(info(), Params())
    first.warn("plain text")
    second.warn("one text", TOO_FEW_TEXTS)
    first.merge(pickle.loads(pickle.dumps(second)))  # noqa: S301 - our own bytes
    assert first.warnings == ["plain text", "one text"]
    assert [warning.code for warning in first.warnings] == ["", TOO_FEW_TEXTS]
    assert json.dumps(first.warnings) == '["plain text", "one text"]'


def test_a_run_keeps_the_codes_of_warnings_and_accepts_plain_text() -> None:
    class AppendsPlainText(Complete):
        def compute(self) -> Mapping[str, Table]:
            self.warn("one text", TOO_FEW_TEXTS)
            self.warnings.append("plain text")  # type: ignore[arg-type]
            return {}

    run = phaselens.run(toy_lens(), metrics=[AppendsPlainText], texts=[letters(3)])
    codes = {str(warning): getattr(warning, "code", None) for warning in run.warnings}
    assert codes["whole: llama: one text"] == TOO_FEW_TEXTS
    assert codes["whole: llama: plain text"] == ""


def test_figure_panels_must_show_columns_that_the_metric_declares() -> None:
    class Drawn(Complete):
        tables = (TableSpec("layers", (Column("layer", int), Column("value"))),)

    norms = FigureSet("norms", ("median", "largest"))
    Drawn.figure_panels = (FigurePanel(norms, "median", Display("value", "value")),)
    assert require_metric(Drawn, "here") is Drawn
    Drawn.figure_panels = (FigurePanel(norms, "median", Display("vlaue", "")),)
    with pytest.raises(
        TypeError, match="here: figure panel 'median' of Drawn: table layers has no column vlaue"
    ):
        require_metric(Drawn, "here")
    Drawn.figure_panels = [norms]  # type: ignore[assignment]
    with pytest.raises(TypeError, match=r"Drawn sets `figure_panels` to .*; give a tuple of FigurePanels"):
        require_metric(Drawn, "here")
    with pytest.raises(TypeError, match="name is the str 'mean'; figure set 'norms' has median, largest"):
        FigurePanel(norms, "mean", Display("value", "value"))
