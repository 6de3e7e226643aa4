"""Plugins are listed from their metadata and imported one at a time; errors name the plugin."""

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


def test_names_are_listed_without_importing(install: Install) -> None:
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
        (
            GOOD.format(name="broken", offer="int"),
            "TypeError: .*is not a subclass of phaselens.plugin.Metric",
        ),
        (GOOD.format(name="broken", offer="Metric"), "TypeError: .*sets no `name`"),
        (
            "from phaselens.plugin import hookimpl\n@hookimpl\ndef phaselens_metrics(run): return []",
            "PluginValidationError: ",
        ),
    ],
)
def test_an_error_names_the_broken_plugins_distribution_and_no_other_plugin_fails(
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


def test_a_duplicate_name_stays_with_its_first_owner(install: Install) -> None:
    install("sinks", GOOD.format(name="sinks", offer="Good"), distribution="intruder")
    plugins = Plugins()
    assert plugins.origin("sinks").distribution == "phaselens"
    hidden = [plugin for plugin in plugins.registered if plugin.distribution == "intruder"]
    assert [(plugin.status, plugin.reason.split()[0]) for plugin in hidden] == [("shadowed", "phaselens")]
    assert plugins.names.count("sinks") == 1


LISTENER = (
    GOOD
    + """
finished_runs = []

@hookimpl
def phaselens_run_finished(run):
    finished_runs.append(run)
    {after}
"""
)


def test_only_plugins_of_the_run_are_notified_of_its_end(install: Install) -> None:
    for name in ("used", "unused"):
        install(name, LISTENER.format(name=name, offer="Good", after="pass"))
    plugins = Plugins()
    for name in ("used", "unused"):
        plugins.metric(name)
    run: Any = object()
    assert plugins.notify_run_finished(run, ["used"]) == []
    assert sys.modules["dist_used_used"].finished_runs == [run]
    assert sys.modules["dist_unused_unused"].finished_runs == []


def test_a_failing_listener_is_reported_and_the_next_is_notified(install: Install) -> None:
    install("first", LISTENER.format(name="first", offer="Good", after="raise OSError('disk full')"))
    install("second", LISTENER.format(name="second", offer="Good", after="pass"))
    plugins = Plugins()
    for name in ("first", "second"):
        plugins.metric(name)
    run: Any = object()
    assert plugins.notify_run_finished(run, ["first", "second"]) == [
        "first: phaselens_run_finished failed: OSError: disk full"
    ]
    assert sys.modules["dist_second_second"].finished_runs == [run]
