"""What Tab offers, asked of IPython's own completer."""

from __future__ import annotations

import pytest

from tests.repl.conftest import shell_on


@pytest.fixture(scope="module")
def shell(lenses, tmp_path_factory):
    """One for all: nothing here changes it."""
    folder = tmp_path_factory.mktemp("completion")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))
        with shell_on(lenses, folder) as made:
            yield made


def offered(shell, text: str) -> list[str]:
    from IPython.core.completer import provisionalcompleter

    with provisionalcompleter():
        return [each.text for each in shell.Completer.completions(text, len(text))]


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ('patch("blocks.1.hook_resid_p', ["blocks.1.hook_resid_pre", "blocks.1.hook_resid_post"]),
        ("ablate('blocks.2.hook_ml", ["blocks.2.hook_mlp_out"]),
        ('patch(layer=range(2), pos="all", what="r', ["resid"]),
        ('sweep("p', ["pattern"]),
        ('sweep("q", "v', ["v"]),
        ('sweep("q", by="pos', ["pos", "pos-head"]),
        ('ablate(what="mlp", value="m', ["mean"]),
        ('condition("bos-', ["bos-mlp", "bos-v"]),
        ('metric("si', ["sinks"]),
        ('metric("lo', ["loss"]),
        ('guide("attr', ["attribution"]),
        ('m.prompt("a", bos="ne', ["never"]),
        ('models["other', ["other-model"]),
    ],
)
def test_names_are_offered_where_they_belong(shell, typed, expected):
    assert sorted(offered(shell, typed)) == sorted(expected)


def test_verbs_and_attributes_are_still_pythons(shell):
    assert "patched" in offered(shell, "patc")
    assert any(each.endswith("prompt") for each in offered(shell, "m.promp"))
    assert "sweep" in offered(shell, "swe")


def test_nothing_is_offered_that_cannot_be_edited(shell):
    names = offered(shell, 'patch("blocks.0.')
    assert "blocks.0.attn.hook_pattern" in names
    assert not [name for name in names if name.endswith(("hook_sink", "hook_lse", ".hook_in"))]
    for name in names:
        shell.user_ns["m"].require_hook(name)
