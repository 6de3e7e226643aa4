"""What a Metric class must have, and what it brings."""

from collections.abc import Mapping, Sequence

import pytest
import torch

from phaselens.plugin import Column, Display, LayerView, Metric, Params, Table, TableSpec, require_metric
from tests.plugins.views import info, view


class Whole(Metric[Params]):
    name = "whole"
    version = "1"
    tables = (TableSpec("summary", (Column("value"),)),)

    def hooks(self) -> Sequence[str]:
        return ["hook_embed"]

    def update(self, layer: LayerView) -> None: ...

    def compute(self) -> Mapping[str, Table]:
        return {}


def test_a_whole_metric_is_taken() -> None:
    assert require_metric(Whole, "here") is Whole


def test_what_is_missing_is_named() -> None:
    class Unfinished(Metric[Params]):
        name = "unfinished"
        version = "1"
        tables = ()

    class Nameless(Whole):
        name = None  # type: ignore[assignment]

    with pytest.raises(TypeError, match="here: Unfinished does not define compute, hooks, update"):
        require_metric(Unfinished, "here")
    with pytest.raises(TypeError, match="here: Nameless sets no `name`"):
        require_metric(Nameless, "here")
    with pytest.raises(TypeError, match="here: 'sinks' is no subclass"):
        require_metric("sinks", "here")


def test_a_merged_metric_has_the_warnings_of_both() -> None:
    """Those of the one that takes over come first, and none comes twice."""

    class Cautious(Whole):
        def update(self, layer: LayerView) -> None:
            self.warn(f"null in layer {layer.index}")

    def measured(*layers: int) -> Metric[Params]:
        metric = Cautious(info(n_layers=4), Params())
        for index in layers:
            metric.update(view({"hook_resid_pre": torch.zeros(1, 2, 8)}, (2,), index))
        return metric

    first, second = measured(2, 0), measured(1, 2, 3)
    first.merge(second)
    assert first.warnings == [f"null in layer {index}" for index in (2, 0, 1, 3)]
    assert second.warnings == [f"null in layer {index}" for index in (1, 2, 3)]


def test_a_table_is_built_from_its_declaration() -> None:
    assert Whole.table("summary", [(1.5,)]).rows == [(1.5,)]
    with pytest.raises(KeyError, match="whole declares no table 'layers'"):
        Whole.table("layers", [])


def test_a_display_of_what_no_table_has_is_refused() -> None:
    class Showing(Whole):
        tables = (TableSpec("layers", (Column("layer", int), Column("value"))),)

    Showing.display = Display(value="value", title="value")
    assert require_metric(Showing, "here") is Showing
    for display, complaint in (
        (Display(value="vlaue", title=""), "table layers has no column vlaue"),
        (Display(value="value", title="", null="null"), "table layers has no column null"),
        (Display(value="value", title="", table="other"), "table other has no column layer"),
        (Display(value="value", title="", summary=(("mean", "mean"),)), "table summary has no column mean"),
        (Display(value="value", title="", by_head="value"), "table heads has no column head"),
    ):
        Showing.display = display
        with pytest.raises(TypeError, match=f"here: the display of Showing: {complaint}"):
            require_metric(Showing, "here")
