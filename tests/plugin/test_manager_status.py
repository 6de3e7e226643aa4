"""The status that `phaselens plugins` shows for each plugin: ok, disabled, shadowed or failed, and why."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from phaselens.errors import InputError
from phaselens.plugin import Plugins, RegisteredPlugin, subprocess_check
from tests.distributions import Install
from tests.plugin.test_manager import GOOD

# The tests of this file take seconds; only the whole suite runs them.
pytestmark = pytest.mark.slow


def checked_plugin(name: str) -> RegisteredPlugin:
    """Check all plugins, and return the one of that name."""
    (plugin,) = [candidate for candidate in Plugins().check_all() if candidate.name == name]
    return plugin


def good(name: str, prefix: str = "") -> str:
    return prefix + GOOD.format(name=name, offer="Good")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import not_there", "ModuleNotFoundError: No module named 'not_there'"),
        ("def broken(:", "SyntaxError: invalid syntax"),
        ("import sys; sys.exit('bye')", "SystemExit: bye"),
        ("import os; os._exit(7)", "importing it ended the process with code 7"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt:"),
        ("x = 1", "LookupError: it offers no metric, model, texts or command of this name; "),
        (good("other"), "LookupError: it offers no metric, model, texts or command of this name; "),
        (good("broken").replace("@hookimpl\n", ""), "LookupError: dist_broken_broken defines phaselens_metrics "),
        (good("broken").replace("_metrics()", "_metrics(run)"), "PluginValidationError: Plugin 'dist_broken_broken'"),
        (good("broken").replace("_metrics()", "_metric()"), "PluginValidationError: unknown hook 'phaselens_metric'"),
        (good("broken").replace("[Good]", '["not_there:Good"]'), "ModuleNotFoundError: No module named 'not_there'"),
    ],
)  # fmt: skip
def test_a_broken_plugin_is_failed_and_the_others_are_ok(install: Install, source: str, reason: str) -> None:
    install("broken", source)
    install("sound", good("sound"))
    checked = {plugin.name: plugin for plugin in Plugins().check_all()}
    failed = checked.pop("broken")
    assert (failed.status, failed.distribution, failed.version) == ("failed", "dist-broken", "2.5")
    assert failed.reason.startswith(reason)
    assert {plugin.status for plugin in checked.values()} == {"ok"}
    assert checked["sound"].offers == checked["sinks"].offers == ("metric",)
    assert "dist_sound_sound" not in sys.modules  # it was imported in another process


def test_a_plugin_that_takes_a_second_to_import_works(install: Install) -> None:
    install("slow", good("slow", "import time; time.sleep(1)\n"))
    assert checked_plugin("slow").status == "ok"


def test_plugins_that_never_finish_importing_share_one_timeout(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess_check, "TIMEOUT", 2.0)
    for name in ("one", "two"):
        install(name, "import time; time.sleep(1000)")
    start = time.monotonic()
    assert {checked_plugin(name).reason for name in ("one", "two")} == {"importing it took more than 2 s"}
    assert time.monotonic() - start < 20


def test_a_plugin_that_never_finishes_importing_fails_no_other(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess_check, "TIMEOUT", 10.0)
    install("a-hanging-one", "import time; time.sleep(1000)")
    install("sound", good("sound"))
    checked = {plugin.name: plugin for plugin in Plugins().check_all()}
    assert checked["a-hanging-one"].reason == "importing it took more than 10 s"
    assert (checked["sound"].status, checked["sound"].offers) == ("ok", ("metric",))


def test_output_and_leftover_threads_of_a_plugin_do_no_harm(install: Install) -> None:
    loud = "print('hello', flush=True); import os, threading; os.write(1, b'again')\n"
    install("loud", good("loud", loud + "threading.Thread(target=threading.Event().wait).start()\n"))
    assert checked_plugin("loud").status == "ok"


@pytest.mark.parametrize(
    ("requires", "reason"),
    [
        ("phaselens>=99", "it needs phaselens>=99; this is "),
        ("PhaseLens<0.0.1", "it needs phaselens<0.0.1; this is "),
        ("phaselens=>1", "its requirement 'phaselens=>1' cannot be read"),
    ],
)
def test_an_incompatible_version_is_detected_without_importing(
    install: Install, requires: str, reason: str
) -> None:
    install("future", "raise AssertionError('imported')", requires=requires)
    plugin = checked_plugin("future")
    assert plugin.status == "failed"
    assert plugin.reason.startswith(reason)
    assert "future" not in Plugins().names
    with pytest.raises(InputError, match=rf"plugin 'future' \(dist-future 2\.5\) is failed: {reason}"):
        Plugins().metric("future")


@pytest.mark.parametrize("requires", ["phaselens>=0.0.1", "numpy>=99", "phaselens>=99; extra == 'x'"])
def test_other_requirements_are_not_checked(install: Install, requires: str) -> None:
    install("sound", good("sound"), requires=requires)
    assert Plugins().metric("sound").name == "sound"


def test_an_entry_point_without_a_module_has_failed(install: Install) -> None:
    install("odd", "", value="no module:at all")
    assert checked_plugin("odd").reason == "its entry point does not name a module: 'no module:at all'"


def test_metadata_that_cannot_be_read_hides_only_its_own_plugins(install: Install, tmp_path: Path) -> None:
    install("unreadable", "")
    (points,) = (tmp_path / "site").glob("dist_unreadable*/entry_points.txt")
    points.write_text("[phaselens]\nwithout a sign\n")
    install("sound", good("sound"))
    assert {"sound", "sinks"} <= set(Plugins().names)


def test_a_plugin_with_a_duplicate_name_is_shadowed(install: Install) -> None:
    install("sinks", good("sinks"), distribution="intruder")
    install("mine", good("mine"), distribution="dist-a")
    install("mine", good("mine"), distribution="dist-b")
    statuses = {(plugin.name, plugin.distribution): plugin for plugin in Plugins().check_all()}
    assert statuses["sinks", "phaselens"].status == statuses["mine", "dist-a"].status == "ok"
    assert statuses["sinks", "intruder"].status == statuses["mine", "dist-b"].status == "shadowed"
    assert statuses["mine", "dist-b"].reason == "dist-a 2.5 has a plugin of this name"


def test_only_the_plugins_named_in_the_environment_are_allowed(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        install(name, good(name))
    monkeypatch.setenv("PHASELENS_PLUGINS", "one, sinks")
    assert Plugins().names == ["one", "sinks"]
    monkeypatch.setenv("PHASELENS_PLUGINS", "dist-two")
    assert Plugins().names == ["two"]
    monkeypatch.setenv("PHASELENS_PLUGINS", "")
    assert Plugins().names == []
    monkeypatch.setenv("PHASELENS_PLUGINS", "sink")
    assert [
        (plugin.name, plugin.reason) for plugin in Plugins().check_all() if plugin.status == "failed"
    ] == [("sink", "named in PHASELENS_PLUGINS, but not installed")]


def test_disabled_plugins_are_named_but_not_loaded(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("one", "raise AssertionError('imported')")
    install("sinks", good("sinks"), distribution="intruder")
    monkeypatch.setenv("PHASELENS_DISABLE_PLUGINS", "one,intruder")
    assert checked_plugin("one").status == "disabled"
    assert "one" not in Plugins().names
    with pytest.raises(
        InputError, match=r"'one' \(dist-one 2\.5\) is disabled: named in PHASELENS_DISABLE_PLUGINS"
    ):
        Plugins().metric("one")
    statuses = {
        plugin.distribution: plugin.status for plugin in Plugins().check_all() if plugin.name == "sinks"
    }
    assert statuses == {"phaselens": "ok", "intruder": "disabled"}


def test_disabling_the_owner_of_a_name_enables_the_next(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("sinks", good("sinks"), distribution="better")
    monkeypatch.setenv("PHASELENS_DISABLE_PLUGINS", "phaselens")
    assert Plugins().origin("sinks").distribution == "better"


def test_in_strict_mode_a_failed_plugin_is_an_error_for_every_command(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("broken", "import not_there")
    Plugins().require_working()
    monkeypatch.setenv("PHASELENS_STRICT_PLUGINS", "1")
    with pytest.raises(InputError, match=r"plugin 'broken' \(dist-broken 2\.5\) failed: ModuleNotFoundError"):
        Plugins().require_working()


def test_a_status_is_plain_json(install: Install) -> None:
    install("broken", "import not_there")
    assert json.loads(json.dumps(checked_plugin("broken").as_dict())) == {
        "name": "broken",
        "status": "failed",
        "distribution": "dist-broken",
        "version": "2.5",
        "module": "dist_broken_broken",
        "offers": [],
        "kind": "",
        "measures": "",
        "reason": "ModuleNotFoundError: No module named 'not_there'",
    }
