"""Tab completion, through IPython's completer."""

from __future__ import annotations

import pytest

from tests.repl.conftest import shell_on


@pytest.fixture(scope="module")
def shell(lenses, tmp_path_factory):
    """Yield one shell for all tests, none of which changes it."""
    folder = tmp_path_factory.mktemp("completion")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))
        with shell_on(lenses, folder) as shell:
            yield shell


def offered_completions(shell, text: str) -> list[str]:
    from IPython.core.completer import provisionalcompleter

    with provisionalcompleter():
        return [completion.text for completion in shell.Completer.completions(text, len(text))]


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
        ('metric("sinks', ["sinks"]),
        ('metric("lo', ["loss"]),
        ('guide("attr', ["attribution"]),
        ('m.prompt("a", bos="ne', ["never"]),
        ('models["other', ["other-model"]),
    ],
)
def test_names_are_completed_in_their_arguments(shell, typed, expected):
    assert sorted(offered_completions(shell, typed)) == sorted(expected)


def test_verbs_and_attributes_are_completed_by_ipython(shell):
    assert "patched" in offered_completions(shell, "patc")
    assert any(completion.endswith("prompt") for completion in offered_completions(shell, "m.promp"))
    assert "sweep" in offered_completions(shell, "swe")


def test_only_points_that_can_be_edited_are_completed(shell):
    names = offered_completions(shell, 'patch("blocks.0.')
    assert "blocks.0.attn.hook_pattern" in names
    assert not [name for name in names if name.endswith(("hook_sink", "hook_lse", ".hook_in"))]
    for name in names:
        shell.user_ns["m"].require_hook(name)
