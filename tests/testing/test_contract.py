"""The contract: every built-in metric keeps it, and a metric that breaks it fails the right check."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from phaselens.errors import InputError
from phaselens.plugin import Column, Display, LayerView, Metric, Params, Plugins, Table, TableSpec
from phaselens.testing import _checks, check_metric, examine
from tests.plugins.test_knowledge import LETTERS, write
from tests.plugins.test_passkey import CONTRACT

# The tests of this file take seconds; only the whole suite runs them.
pytestmark = pytest.mark.slow

BUILT_IN = [plugin.name for plugin in Plugins().registered if plugin.distribution == "phaselens"]


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_metric_keeps_the_contract(name: str, tmp_path: Path) -> None:
    # These two have no default that works on a tiny model.
    needed = {"passkey": CONTRACT, "knowledge": {"file": write(tmp_path, LETTERS)}}
    check_metric(Plugins().metric(name), needed.get(name))


class Sound(Metric[Params]):
    """Mean sink of each text and layer, over real queries."""

    name = "sound"
    version = "1"
    tables = (
        TableSpec("texts", (Column("text", str), Column("layer", int), Column("mean"))),
        TableSpec("layers", (Column("layer", int), Column("mean"), Column("null"))),
    )
    display: Any = Display(value="mean", title="mean", null="null")

    def hooks(self) -> Sequence[str]:
        return ["blocks.{layer}.attn.hook_sink"]

    def update(self, layer: LayerView) -> None:
        sink, real = layer.float64("attn.hook_sink"), layer.batch.real[:, None]
        self.per_text.add(layer, mean=(sink * real).sum(-1).mean(1) / real.sum(-1)[:, 0])

    def null(self, length: int, window: int | None) -> float:
        window = window or length
        return sum(1 / (query + 1) for query in range(min(length, window))) / length

    def compute(self) -> Mapping[str, Table]:
        mean = self.per_text.stack("mean")
        texts = self.per_text.texts
        cells = list(itertools.product(range(len(texts)), range(mean.shape[1])))
        null = [
            sum(self.null(length, window) for length in self.per_text.lengths) / len(texts)
            for window in self.model.windows
        ]
        layers = [(layer, mean[:, layer].mean(), null[layer]) for layer in range(mean.shape[1])]
        return {
            "texts": self.table(
                "texts", [(texts[index], layer, mean[index, layer]) for index, layer in cells]
            ),
            "layers": self.table("layers", layers),
        }


def broken(**changes: Any) -> type[Sound]:
    return type("Broken", (Sound,), {"__module__": __name__, **changes})


def counts_pads(self: Sound, layer: LayerView) -> None:
    self.per_text.add(layer, mean=layer.float64("attn.hook_sink").mean((1, 2)))


def scribbles(self: Sound, layer: LayerView) -> None:
    Sound.update(self, layer)
    layer["attn.hook_sink"].mul_(0.5)


def squares(self: Sound, layer: LayerView) -> None:
    Sound.update(self, layer)
    sink = layer["attn.hook_sink"][:, 0]
    (sink[:, :, None] * sink[:, None]).sum()


def squares_by_numpy(self: Sound, layer: LayerView) -> None:
    import numpy as np

    Sound.update(self, layer)
    sink = layer["attn.hook_sink"][0, 0].numpy()
    np.outer(sink, sink).sum()


def forgets(self: Sound, other: Sound) -> None:
    return


def keeps_a_function(self: Sound) -> None:
    self.function = lambda: 0


def differs(self: Sound) -> Mapping[str, Table]:
    tables = Sound.compute(self)
    tables["layers"].rows[0] = (0, next(COUNTER), 0.0)
    return tables


def leaves_one_out(self: Sound) -> Mapping[str, Table]:
    return {"texts": Sound.compute(self)["texts"]}


def unexplained_missing_value(self: Sound) -> Mapping[str, Table]:
    tables = Sound.compute(self)
    tables["texts"].rows[0] = (*tables["texts"].rows[0][:2], None)
    return tables


def raises(self: Sound) -> Mapping[str, Table]:
    raise ZeroDivisionError("its own fault")


def refuses(self: Sound) -> None:
    raise InputError("wants eight layers")


def wrong_null(self: Sound, length: int, window: int | None) -> float:
    return 0.25


COUNTER = itertools.count()


def test_a_sound_metric_passes_every_check() -> None:
    findings = examine(Sound)
    assert {finding.status for finding in findings} == {"ok"}
    assert len(findings) == 12
    check_metric(Sound)


@pytest.mark.parametrize(
    ("metric", "check", "detail"),
    [
        (broken(tables=(), display=None), "a usable class", "tables: expected at least one"),
        (broken(display=Display(value="men", title="")), "a usable class", "table layers has no column men"),
        (broken(compute=raises), "measures tiny models", "ZeroDivisionError in compute on llama: its own fault"),
        (broken(setup=refuses), "measures tiny models", "it refuses every model: wants eight layers"),
        (broken(compute=leaves_one_out), "tables as declared", "tables ['texts'], declared are"),
        (broken(update=counts_pads), "batch size and padding change nothing", "texts padded together: "),
        (broken(merge=forgets), "halves merged equal the whole", "rows instead of"),
        (broken(setup=keeps_a_function), "state survives a file", "Broken.function is a function"),
        (broken(compute=differs), "same numbers twice", "the second run: layers.mean, row 0: "),
        (broken(update=scribbles), "activations are not changed", "update changed attn.hook_sink; work on a copy"),
        (
            broken(compute=unexplained_missing_value),
            "missing values have reasons",
            "1 cells are missing for a text of one token",
        ),
        (broken(null=wrong_null), "uniform attention gives the null", "mean differs from null by "),
        (broken(update=squares), "memory grows with the text, not its square", "memory of update grows by "),
        (broken(update=squares_by_numpy), "memory grows with the text, not its square", "memory of update grows by "),
        (
            broken(hooks=lambda self: ["blocks.{layer}.attn.hook_sink", "blocks.{layer}.attn.hook_pattern"]),
            "memory grows with the text, not its square",
            "it reads blocks.{layer}.attn.hook_pattern, which is [query, key]",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and value[0].islower() else "",
)  # fmt: skip
def test_a_broken_metric_fails_the_right_check(metric: type[Sound], check: str, detail: str) -> None:
    findings = {finding.name: finding for finding in examine(metric)}
    assert findings[check].status == "failed"
    assert detail in findings[check].detail


def test_the_error_names_each_failed_check_and_shows_the_traceback() -> None:
    with pytest.raises(AssertionError, match="Broken fails 1 checks of the contract") as caught:
        check_metric(broken(compute=raises))
    assert 'raise ZeroDivisionError("its own fault")' in str(caught.value)


def test_reading_the_matrix_can_be_allowed() -> None:
    reads = broken(hooks=lambda self: ["blocks.{layer}.attn.hook_sink", "blocks.{layer}.attn.hook_pattern"])
    statuses = {finding.name: finding.status for finding in examine(reads, allow_matrix=True)}
    assert statuses["memory grows with the text, not its square"] == "skipped"


def test_parameters_that_do_not_exist_are_a_finding() -> None:
    assert examine(Sound, {"threshold": 1})[-1].detail == "no parameter 'threshold'; none is known"


@pytest.mark.parametrize(
    ("value", "detail"), [(float("nan"), "Out of range float"), ((1, 2), "a list is a tuple")]
)
def test_a_run_that_is_not_json_is_found(value: object, detail: str) -> None:
    """Tables are checked cell by cell before; what else a run holds is seen here."""
    run = SimpleNamespace(to_dict=lambda: {"a": value})
    subject: Any = SimpleNamespace(lenses=["rope"], default_run=lambda model: run)
    with pytest.raises(_checks.Broken, match=detail):
        _checks.strict_json(subject)
