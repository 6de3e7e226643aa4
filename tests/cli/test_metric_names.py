"""Words for groups of metrics on the command line."""

from __future__ import annotations

from phaselens.cli.metric_names import metrics_named
from phaselens.plugin import kind_of, plugins


def test_a_group_is_the_metrics_of_its_kind() -> None:
    groups = {group: metrics_named([group]) for group in ("observational", "causal", "task")}
    for group, names in groups.items():
        assert names
        assert {kind_of(plugins().metric(name)) for name in names} == {group}
    assert sorted(metrics_named(["all"])) == sorted(name for names in groups.values() for name in names)


def test_a_group_beside_a_name_repeats_nothing() -> None:
    names = metrics_named(["sinks", "observational,bos-v"])
    assert names[0] == "sinks"
    assert names[-1] == "bos-v"
    assert len(names) == len(set(names))


def test_metrics_that_supply_details_to_reports_are_in_no_group() -> None:
    hidden = [name for name in metrics_named(["all"]) if not plugins().metric(name).prints]
    assert hidden == []
