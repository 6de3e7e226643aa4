"""`phaselens plugins`, and broken plugins in other commands: one line each, and the results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from phaselens.plugin import plugins
from tests.cli.conftest import ErrorLine, Phaselens
from tests.distributions import Install
from tests.plugin.test_manager import GOOD

# The tests of this file take seconds; only the whole suite runs them.
pytestmark = pytest.mark.slow


def good(name: str, prefix: str = "") -> str:
    return prefix + GOOD.format(name=name, offer="Good")


def test_the_list_shows_each_state_with_distribution_version_and_reason(
    phaselens: Phaselens, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("broken", "import not_there")
    install("off", good("off"))
    install("sinks", good("sinks"), distribution="intruder")
    install("fine", good("fine"))
    monkeypatch.setenv("PHASELENS_DISABLE_PLUGINS", "off")
    outcome = phaselens("plugins")
    assert (outcome.code, outcome.err) == (0, "")
    lines = {(*line.split()[:2], *line.split()[3:5]): line for line in outcome.out.splitlines()}
    assert lines["broken", "failed", "dist-broken", "2.5"].endswith(
        "ModuleNotFoundError: No module named 'not_there'"
    )
    assert lines["off", "disabled", "dist-off", "2.5"].endswith("named in PHASELENS_DISABLE_PLUGINS")
    assert lines["sinks", "shadowed", "intruder", "2.5"].endswith("has a plugin of this name")
    assert ("fine", "ok", "dist-fine", "2.5") in lines
    monkeypatch.setenv("PHASELENS_STRICT_PLUGINS", "1")
    plugins.cache_clear()
    assert phaselens("plugins").code == 1


def test_the_list_as_json(phaselens: Phaselens, install: Install) -> None:
    install("loud", good("loud", "print('noise')\n"))
    outcome = phaselens("plugins", "--json")
    assert outcome.code == 0
    states = {plugin["name"]: plugin for plugin in json.loads(outcome.out)}
    assert states["loud"]["status"] == states["sinks"]["status"] == "ok"
    assert states["sinks"]["offers"] == ["metric"]
    assert set(states["sinks"]) == {
        "name", "status", "distribution", "version", "module", "offers", "kind", "measures", "reason",
    }  # fmt: skip
    assert (states["loud"]["kind"], states["passkey"]["kind"]) == ("observational", "task")


def test_a_requested_broken_plugin_is_an_error_that_names_distribution_and_exception(
    error_line: ErrorLine, install: Install
) -> None:
    install("broken", "import not_there")
    message = error_line(2, "run", "-p", "broken")
    problem = r"ModuleNotFoundError: No module named 'not_there' \(\S*dist_broken_broken\.py:1\)"
    assert re.fullmatch(
        rf"plugin 'broken' \(dist-broken 2\.5\) cannot be loaded: {problem}; fix or uninstall it", message
    )


def test_a_run_imports_no_other_plugin_and_notes_those_whose_metadata_rules_them_out(
    phaselens: Phaselens, install: Install, checkpoint: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("broken", "import not_there")
    install("future", good("future"), requires="phaselens>=99")
    install("loud", good("loud", "print('noise')\n"))
    arguments = ("run", checkpoint, "-p", "sinks,loud", "--texts", texts, "--format", "json")
    outcome = phaselens(*arguments)
    assert outcome.code == 0
    assert set(json.loads(outcome.out)["metrics"]) == {"sinks", "loud"}
    noise, *lines = outcome.err.splitlines()
    assert noise == "noise"
    assert [line.split(":", 3)[2] for line in lines] == [" plugin 'future' (dist-future 2.5) is left out"]
    assert phaselens(*arguments, "--quiet").err == ""
    monkeypatch.setenv("PHASELENS_STRICT_PLUGINS", "1")
    plugins.cache_clear()
    assert phaselens(*arguments).code == 2


STAGES = {
    "construct: define": (
        "def hooks(self): return",
        "@classmethod\n    def define(cls, params): raise {error}\n    def hooks(self): return",
    ),
    "construct": ("def hooks(self): return", 'def setup(self): raise {error}\n    def hooks(self): return'),
    "update": ("def update(self, layer): pass", "def update(self, layer): raise {error}"),
    "compute": ("def compute(self): ", "def compute(self): raise {error}\n    def unused(self): "),
}  # fmt: skip


@pytest.mark.parametrize("error", ["ZeroDivisionError('oops')", "SystemExit('oops')"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_metric_that_raises_fails_with_its_traceback_and_the_others_are_written(
    phaselens: Phaselens, install: Install, checkpoint: Path, texts: Path, stage: str, error: str
) -> None:
    find, replacement = STAGES[stage]
    source = good("bad")
    assert find in source
    install("bad", source.replace(find, replacement.format(error=error)))
    outcome = phaselens("run", checkpoint, "-p", "bad,sinks", "--texts", texts, "--format", "json")
    assert outcome.code == 1
    metrics = json.loads(outcome.out)["metrics"]
    assert (metrics["bad"]["status"], metrics["sinks"]["status"]) == ("failed", "ok")
    (failure,) = metrics["bad"]["errors"]
    assert (failure["stage"], failure["message"]) == (stage.split(":")[0], "oops")
    assert "dist_bad_bad.py" in failure["traceback"]
    assert metrics["sinks"]["tables"]["layers"]["rows"]


@pytest.mark.parametrize(
    ("plot", "message"),
    [
        ("raise ZeroDivisionError('oops')", "oops"),
        ("figure.subplots().set_title('$broken{$')", "ParseFatalException"),
        (None, "Good sets plots = True but does not define plot"),
    ],
)
def test_a_metric_whose_drawing_fails_is_reported_as_failed(
    phaselens: Phaselens,
    install: Install,
    checkpoint: Path,
    texts: Path,
    tmp_path: Path,
    plot: str | None,
    message: str,
) -> None:
    plot_source = f"    @classmethod\n    def plot(cls, tables, figure): {plot}\n" if plot else ""
    install("bad", good("bad").replace("    def hooks", f"    plots = True\n{plot_source}    def hooks"))
    arguments = ("run", checkpoint, "-p", "bad,sinks", "--texts", texts, "--format", "json", "--figures")
    outcome = phaselens(*arguments, tmp_path / "figures")
    assert outcome.code == 1
    metrics = json.loads(outcome.out)["metrics"]
    assert (metrics["bad"]["status"], metrics["sinks"]["status"]) == ("failed", "ok")
    (failure,) = metrics["bad"]["errors"]
    assert failure["stage"] == "plot"
    assert message in failure["message"]
    assert failure["traceback"].startswith("Traceback")
    assert metrics["bad"]["tables"]["summary"]["rows"]
    assert (tmp_path / "figures" / "sinks.png").is_file()


def test_a_metric_draws_its_own_figure(
    phaselens: Phaselens, install: Install, checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    plot = "figure.text(0, 0, str(tables['summary'].column('model')))"
    plot_source = (
        f"    plots = True\n    @classmethod\n    def plot(cls, tables, figure): {plot}\n    def hooks"
    )
    install("own", good("own").replace("    def hooks", plot_source))
    outcome = phaselens("run", checkpoint, "-p", "own", "--texts", texts, "--figures", tmp_path)
    assert outcome.code == 0
    assert {path.name for path in tmp_path.glob("own.*")} == {"own.png", "own.svg"}


def test_a_file_is_measured_without_being_installed(
    phaselens: Phaselens, error_line: ErrorLine, checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    path = tmp_path / "metric.py"
    path.write_text(good("once"))
    for names in ([], ["-p", "once"]):
        outcome = phaselens(
            "run", checkpoint, "--plugin-file", path, *names, "--texts", texts, "--format", "json"
        )
        assert (outcome.code, outcome.err) == (0, "")
        metrics = json.loads(outcome.out)["metrics"]
        assert {name: result["distribution"] for name, result in metrics.items()} == {"once": f"file {path}"}
        plugins.cache_clear()
    assert error_line(2, "run", "--plugin-file", "none.py").startswith(
        "plugin file 'none.py': there is no such file"
    )


def test_show_describes_a_metric(phaselens: Phaselens) -> None:
    outcome = phaselens("plugins", "show", "sinks")
    assert (outcome.code, outcome.err) == (0, "")
    words = " ".join(outcome.out.split())
    for line in (
        "sinks: attention sinks",
        "Gu et al. 2024, arXiv:2410.10781",
        "threshold 0.3 share of attention a number, 0 to 1",
        "order threshold_then_mean – threshold_then_mean or mean_then_threshold",
        "hook points blocks.{layer}.attn.hook_sink blocks.{layer}.attn.hook_received",
        "table layers: one row per layer",
        "sink_rate float share of heads heads whose score reaches the threshold (the displayed value)",
        "null_rate float share of heads sink_rate if all attention were uniform (its null)",
    ):
        assert line in words


def test_show_knows_every_installed_metric(phaselens: Phaselens) -> None:
    names = [plugin["name"] for plugin in json.loads(phaselens("plugins", "--json").out)]
    assert "p-rope" in names
    for name in names:
        outcome = phaselens("plugins", "show", name)
        assert (outcome.code, outcome.err) == (0, ""), name


def test_show_distinguishes_causal_from_observational_metrics(phaselens: Phaselens) -> None:
    for name, kind_line in (
        ("sinks", "observational: it does not change the model"),
        ("bos-v", "causal: it changes the model"),
        ("passkey", "task: it tests the model on prompts of its own"),
    ):
        outcome = phaselens("plugins", "show", name)
        assert (outcome.code, outcome.err) == (0, "")
        assert f"\nkind: {kind_line}" in outcome.out
    words = " ".join(outcome.out.split())
    assert "hook points none" in words, "by default it looks at nothing before"
    assert "table conditions: one row per condition, the baseline first" in words
    assert (
        "exact float share of prompts share in which greedy decoding gives the whole key (the displayed value)"
        in words
    )


def test_show_of_an_unknown_name_gets_close_matches(error_line: ErrorLine) -> None:
    assert error_line(2, "plugins", "show", "sink") == "no plugin 'sink'; did you mean sinks?"
    assert error_line(2, "plugins", "--json", "show", "sinks").startswith(
        "--json lists all plugins; leave it out"
    )


def test_check_of_a_file_that_keeps_the_contract_and_of_one_that_does_not(
    phaselens: Phaselens, tmp_path: Path
) -> None:
    broken_file = tmp_path / "metric.py"
    broken_file.write_text(good("bad").replace('return {"summary"', 'return {} or {"other"'))
    outcome = phaselens("plugins", "check", broken_file)
    assert outcome.code == 1
    lines = [line.split() for line in outcome.out.splitlines()]
    assert ["bad", "ok", "a", "usable"] in [line[:4] for line in lines]
    assert ["bad", "failed", "measures", "tiny"] in [line[:4] for line in lines]
    sound_file = tmp_path / "fine.py"
    sound_file.write_text(good("fine"))
    outcome = phaselens("plugins", "check", sound_file)
    assert (outcome.code, "failed" in outcome.out) == (0, False)


def test_plugins_lists_names_distributions_and_versions(phaselens: Phaselens) -> None:
    outcome = phaselens("plugins")
    assert (outcome.code, outcome.err) == (0, "")
    lines = [line.split() for line in outcome.out.splitlines()]
    assert lines[0] == ["plugin", "status", "kind", "from", "measures"]
    assert ["sinks", "ok", "observational", "phaselens"] in [line[:4] for line in lines[1:]]
    for line in lines[1:]:
        assert len(line) > 6, "every built-in metric says what it measures"
