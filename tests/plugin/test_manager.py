"""Plugins are known by their metadata, loaded alone, and blamed by name."""

import sys
from typing import Any

import pytest

from phaselens.errors import InputError
from phaselens.plugin import Plugins
from tests.distributions import Install

GOOD = """
from phaselens.plugin import Column, Metric, TableSpec, hookimpl

class Good(Metric):
    name = "{name}"
    version = "1"
    tables = (TableSpec("summary", (Column("value"),)),)
    def hooks(self): return ["hook_embed"]
    def update(self, layer): pass
    def compute(self): return {{"summary": self.table("summary", [(1.0,)])}}

@hookimpl
def phaselens_metrics():
    return [{offer}]
"""


def test_the_built_in_metric_is_registered_like_any_other() -> None:
    origin = Plugins().origin("sinks")
    assert (origin.module, origin.distribution) == ("phaselens_plugins.sinks", "phaselens")


def test_names_are_known_without_importing(install: Install) -> None:
    install("explosive", "raise SystemExit('imported')")
    plugins = Plugins()
    assert {"sinks", "explosive"} <= set(plugins.names)
    assert "dist_explosive_explosive" not in sys.modules


def test_a_metric_is_loaded_by_class_or_by_its_path(install: Install) -> None:
    install("direct", GOOD.format(name="direct", offer="Good"))
    install("late", GOOD.format(name="late", offer='"dist_late_late:Good"'))
    plugins = Plugins()
    assert plugins.metric("direct").name == "direct"
    assert plugins.metric("late").name == "late"
    assert plugins.metric("late") is plugins.metric("late")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (
            "import a_module_that_is_not_there",
            "ModuleNotFoundError: No module named 'a_module_that_is_not_there'",
        ),
        ("def broken(:", "SyntaxError: "),
        ("import sys; sys.exit('bye')", "SystemExit: bye"),
        ("x = 1", "LookupError: .* offers none"),
        (GOOD.format(name="another", offer="Good"), "LookupError: .* offers another"),
        (GOOD.format(name="broken", offer="int"), "TypeError: .*is no subclass of phaselens.plugin.Metric"),
        (GOOD.format(name="broken", offer="Metric"), "TypeError: .*sets no `name`"),
        (
            "from phaselens.plugin import hookimpl\n@hookimpl\ndef phaselens_metrics(run): return []",
            "PluginValidationError: ",
        ),
    ],
)
def test_a_broken_plugin_is_blamed_with_its_distribution_and_hurts_no_other(
    install: Install, source: str, reason: str
) -> None:
    install("broken", source, distribution="Some-Dist")
    plugins = Plugins()
    with pytest.raises(InputError, match=rf"plugin 'broken' \(Some-Dist 2\.5\) cannot be loaded: {reason}"):
        plugins.metric("broken")
    assert plugins.metric("sinks").name == "sinks"


def test_an_unknown_name_gets_close_matches() -> None:
    with pytest.raises(InputError, match=r"no plugin 'sink'; did you mean sinks\?"):
        Plugins().metric("sink")


def test_a_name_that_is_taken_stays_with_its_first_owner(install: Install) -> None:
    install("sinks", GOOD.format(name="sinks", offer="Good"), distribution="intruder")
    plugins = Plugins()
    assert plugins.origin("sinks").distribution == "phaselens"
    hidden = [one for one in plugins.registered if one.distribution == "intruder"]
    assert [(one.status, one.reason.split()[0]) for one in hidden] == [("shadowed", "phaselens")]
    assert plugins.names.count("sinks") == 1


LISTENER = (
    GOOD
    + """
heard = []

@hookimpl
def phaselens_run_finished(run):
    heard.append(run)
    {after}
"""
)


def test_only_plugins_of_the_run_hear_that_it_is_over(install: Install) -> None:
    for name in ("used", "unused"):
        install(name, LISTENER.format(name=name, offer="Good", after="pass"))
    plugins = Plugins()
    for name in ("used", "unused"):
        plugins.metric(name)
    run: Any = object()
    assert plugins.run_finished(run, ["used"]) == []
    assert sys.modules["dist_used_used"].heard == [run]
    assert sys.modules["dist_unused_unused"].heard == []


def test_a_listener_that_fails_is_reported_and_the_next_still_hears(install: Install) -> None:
    install("first", LISTENER.format(name="first", offer="Good", after="raise OSError('disk full')"))
    install("second", LISTENER.format(name="second", offer="Good", after="pass"))
    plugins = Plugins()
    for name in ("first", "second"):
        plugins.metric(name)
    run: Any = object()
    assert plugins.run_finished(run, ["first", "second"]) == [
        "first: phaselens_run_finished failed: OSError: disk full"
    ]
    assert sys.modules["dist_second_second"].heard == [run]
