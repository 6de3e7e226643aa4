"""The chosen metrics' parameters are flags, with help, unit and bounds."""

from dataclasses import dataclass
from typing import Any

import pytest

from phaselens.cli.shared_options import by_metric, split_names
from phaselens.data import TextFields
from phaselens.plugin import Params, Plugins, param
from tests.cli.conftest import ErrorLine, Phaselens
from tests.runs.metrics import probe


@dataclass(frozen=True)
class Shared(Params):
    threshold: float = param(1.0, help="its own threshold")
    dtype: str = param("x", help="a name that the command has already")
    depth: int = param(3, help="how deep", unit="layers", minimum=1, maximum=9)


@pytest.fixture
def other_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second metric, named `other`, some of whose parameters collide."""
    metric = probe(name="other", Params=Shared)
    find = Plugins.metric
    monkeypatch.setattr(Plugins, "metric", lambda self, name: metric if name == "other" else find(self, name))


@pytest.fixture
def run_calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Arguments of each call of `phaselens.runs.run`, which is recorded instead of run."""
    calls: list[Any] = []

    class StopBeforeRun(KeyboardInterrupt):
        pass

    def note(models: Any, **options: Any) -> None:
        calls.append({"models": models, **options})
        raise StopBeforeRun

    monkeypatch.setattr("phaselens.runs.run", note)
    return calls


def test_help_shows_the_parameters_of_the_named_metric_only(phaselens: Phaselens) -> None:
    plain_help = phaselens("run", "--help")
    assert plain_help.code == 0
    assert "--sink-position" not in plain_help.out
    metric_help = " ".join(phaselens("run", "--help", "-p", "sinks").out.split())
    assert "Parameters of sinks (also -P sinks.NAME=VALUE):" in metric_help
    assert (
        "--sink-position INTEGER the key whose share of attention is measured [position] "
        "(default: 0; a whole number, 0 or more)" in metric_help
    )
    assert "--include-query0 / --no-include-query0" in metric_help
    assert "--order threshold_then_mean|mean_then_threshold" in metric_help


@pytest.mark.parametrize("way", [["-p", "sinks"], ["-psinks"], ["--plugin", "sinks"], ["--plugin=sinks"]])
def test_flags_work_however_the_metric_is_named(
    phaselens: Phaselens, run_calls: list[Any], way: list[str]
) -> None:
    for arguments in (["--sink-position", "3", *way], [*way, "--sink-position=3"]):
        assert phaselens("run", *arguments).code == 130
        assert run_calls.pop()["metrics"] == [("sinks", {"sink_position": "3"})]


def test_switches_go_both_ways(phaselens: Phaselens, run_calls: list[Any]) -> None:
    phaselens("run", "-p", "sinks", "--include-query0", "--no-strongest")
    assert run_calls.pop()["metrics"] == [("sinks", {"include_query0": True, "strongest": False})]


def test_settings_and_flags_are_taken_together(phaselens: Phaselens, run_calls: list[Any]) -> None:
    phaselens("run", "-p", "sinks", "-P", "sinks.threshold=0.5", "--sink-position", "1")
    assert run_calls.pop()["metrics"] == [("sinks", {"threshold": "0.5", "sink_position": "1"})]


@pytest.mark.usefixtures("other_metric")
def test_a_flag_that_two_metrics_share_belongs_to_neither(
    phaselens: Phaselens, error_line: ErrorLine, run_calls: list[Any]
) -> None:
    message = error_line(2, "run", "-p", "sinks,other", "--threshold", "0.5")
    assert message == (
        "--threshold is a parameter of several metrics; write "
        "-P sinks.threshold=VALUE or -P other.threshold=VALUE"
    )
    phaselens("run", "-p", "sinks,other", "-P", "other.threshold=2", "--depth", "4")
    assert run_calls.pop()["metrics"] == [("sinks", {}), ("other", {"threshold": "2", "depth": "4"})]


@pytest.mark.usefixtures("other_metric")
def test_a_parameter_named_like_an_option_of_the_command_is_set_by_p_only(
    phaselens: Phaselens, run_calls: list[Any]
) -> None:
    phaselens("run", "-p", "other", "--dtype", "float64", "-P", "other.dtype=y")
    call = run_calls.pop()
    assert (call["dtype"], call["metrics"]) == ("float64", [("other", {"dtype": "y"})])


def test_options_of_one_call_do_not_leak_into_the_next(phaselens: Phaselens, run_calls: list[Any]) -> None:
    phaselens("run", "-p", "sinks", "--threshold", "0.5")
    assert "--threshold" not in phaselens("run", "--help").out


def test_what_follows_a_double_dash_is_a_model(phaselens: Phaselens, run_calls: list[Any]) -> None:
    phaselens("run", "-p", "sinks", "--", "-p")
    call = run_calls.pop()
    assert (call["models"], call["metrics"]) == (("-p",), [("sinks", {})])


def test_all_options_reach_the_run(phaselens: Phaselens, run_calls: list[Any]) -> None:
    phaselens(
        "run", "a=rope", "drope@x", "-p", "sinks", "--texts", "t.txt", "--max-tokens", 7, "--n-texts", 3,
        "--batch-tokens", 99, "--bos", "never", "--device", "cpu", "--dtype", "fp16", "--positions", "a=nope",
        "--seed", 5, "--quiet", "--shard-tokens", 999, "--out", "folder", "--text-field", "body",
        "--adapter-scale", "a=0.5", "--window", 6, "--stride", 2,
    )  # fmt: skip
    call = run_calls.pop()
    del call["observer"]
    assert call.pop("command")[:3] == ["phaselens", "run", "a=rope"]
    assert call.pop("metrics")[0] == ("sinks", {})
    expected = {
        "models": ("a=rope", "drope@x"), "texts": "t.txt", "max_tokens": 7, "n_texts": 3,
        "batch_tokens": 99, "bos": "never", "device": "cpu", "dtype": "fp16", "positions": {"a": "nope"}, "seed": 5,
        "shard_tokens": 999, "out": "folder", "fresh": False, "adapter_scale": {"a": 0.5},
        "rope_scaling": {}, "softmax_scale": {}, "text_fields": TextFields(text="body"),
        "window": 6, "stride": 2, "workers": None, "engine": "processes", "address": None, "shards": None,
        "phase": None, "threads": None, "device_map": None,
    }  # fmt: skip
    assert call == expected


def test_without_models_the_bundled_pair_is_measured(phaselens: Phaselens, run_calls: list[Any]) -> None:
    phaselens("run", "-p", "sinks")
    call = run_calls.pop()
    assert (call["models"], call["texts"], call["max_tokens"]) == (("rope", "drope"), "bundled", 512)


def test_names_may_be_repeated_or_listed() -> None:
    assert split_names(["a, b", "c", "a", ","]) == ["a", "b", "c"]


def test_a_value_may_hold_an_equals_sign_and_dots() -> None:
    assert by_metric(["m.name=a=b.c"], ["m"]) == {"m": {"name": "a=b.c"}}
