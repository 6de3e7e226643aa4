"""`phaselens hooks` lists the points that exist, with their shapes; the registry is the only declaration of them."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import phaselens
from phaselens.errors import InputError, RefusedModel
from phaselens.lens import checks, points
from phaselens.lens.checks import capture
from phaselens.lens.hooks import describe_hooks
from phaselens.lens.points import (
    STATISTICS,
    declaration,
    dimensions,
    in_layer,
    is_editable,
    is_matrix,
    read_only_reason,
)
from phaselens.plugin import Edit
from phaselens.testing import tiny_lens
from tests.lens.conftest import lens_of
from tests.runs.metrics import probe

AXES = {
    "batch": 2,
    "pos": 24,
    "d_model": 32,
    "head": 4,
    "d_head": 8,
    "query": 24,
    "key": 24,
    "distance": 64,
    "named_key": 1,
    "segment": 1,
    "1": 1,
    "2": 2,
}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama-gqa", "gpt2", "phi3"])
def test_each_listed_point_has_the_declared_shape(family, tokens):
    lens = lens_of(family)
    axes = {**AXES, "kv_head": lens.info.n_kv_heads, "d_rotary": lens.info.d_head}
    for point in describe_hooks(lens):
        name = point.name.replace("{0..1}", "1")
        _, activations = capture(lens, tokens, {"value": name})
        expected = [axes[axis.strip()] for axis in point.shape.strip("[]").split(",")]
        assert list(activations["value"].shape) == expected, point.name
        assert str(activations["value"].dtype) == f"torch.{point.dtype}"
        assert point.meaning


def test_the_documented_points_are_listed():
    names = {point.name for point in describe_hooks(lens_of("llama-gqa"))}
    attention_points = (
        "q",
        "k",
        "v",
        "rot_q",
        "rot_k",
        "z",
        "pattern",
        "attn_scores",
        "lse",
        "sink",
        "entropy",
        "received",
    )
    expected = {f"blocks.{{0..1}}.attn.hook_{name}" for name in attention_points}
    expected |= {
        f"blocks.{{0..1}}.hook_{n}" for n in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
    }
    assert expected | {"hook_embed", "ln_final.hook_normalized"} <= names


@pytest.mark.slow
def test_points_are_listed_only_for_models_that_have_them():
    """SmolLM3's second layer has no rotation; Cohere 2 has no mid residual."""
    names = [point.name for point in describe_hooks(lens_of("cohere2"))]
    assert not any("resid_mid" in name for name in names)
    assert lens_of("smollm3").info.positions == ("rope", "nope")
    assert lens_of("smollm3").info.positions_summary == "rope 1, nope 1"


def test_all_points_can_be_listed():
    lens = lens_of("llama-gqa")
    all_points = {point.name for point in describe_hooks(lens, every=True)}
    assert "blocks.{0..1}.mlp.hook_in" in all_points
    assert len(all_points) > len(describe_hooks(lens))


def test_one_layers_rotation_can_be_nulled_and_restored():
    from phaselens.lens.rotation import detect_rotation
    from phaselens.testing import tiny_model

    lens = phaselens.load(tiny_model("llama"))
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        original = lens(tokens)
        lens.set_rotation([1], nulled=True)
        assert detect_rotation(lens) == ("rope", "nope")
        assert not torch.equal(lens(tokens), original)
        lens.set_rotation(nulled=False)
        assert torch.equal(lens(tokens), original)


ROOT = Path(__file__).parents[2]


def other_modules(root: str) -> list[Path]:
    """Return the source files under `root`, without the registry."""
    return [
        path for path in (ROOT / root).rglob("*.py") if path.name != "points.py" or path.parent.name != "lens"
    ]


def texts_of(node: ast.AST) -> list[str]:
    """Return the string constants that are elements of a tuple, list or set."""
    elements = node.elts if isinstance(node, ast.Tuple | ast.List | ast.Set) else ()
    return [element.value for element in elements if isinstance(element, ast.Constant)]


@pytest.mark.slow
def test_no_other_module_of_the_package_lists_the_statistics():
    lists = [
        f"{path}:{node.lineno}"
        for path in other_modules("src")
        for node in ast.walk(ast.parse(path.read_text()))
        if len(set(STATISTICS) & {str(text).rsplit(".", 1)[-1] for text in texts_of(node)}) >= 3
    ]
    assert not lists, lists


@pytest.mark.slow
@pytest.mark.parametrize("root", ["src", "plugins"])
def test_no_other_module_has_a_pattern_for_the_points_of_a_layer(root):
    patterns = [
        f"{path}:{node.lineno}"
        for path in other_modules(root)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and r"blocks\." in node.value
    ]
    assert not patterns, patterns


@pytest.mark.slow
@pytest.mark.parametrize("root", ["src", "plugins"])
def test_no_other_module_builds_the_name_of_a_point_in_a_layer(root):
    built = [
        f"{path}:{node.lineno}"
        for path in other_modules(root)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.JoinedStr)
        and isinstance(node.values[0], ast.Constant)
        and str(node.values[0].value).startswith("blocks.")
    ]
    assert not built, built


def test_each_statistic_fires_and_is_read_only(tokens):
    lens = lens_of("llama-gqa")
    for statistic in STATISTICS:
        name = in_layer(1, f"attn.{statistic}")
        assert not is_editable(name)
        assert re.search(r"edit .*hook_pattern", read_only_reason(name))
        assert not is_matrix(name)
        assert capture(lens, tokens, {"value": name})[1]["value"].dim() == len(dimensions(name))
        with pytest.raises(InputError, match="measurement"):
            Edit(f"blocks.{{layer}}.attn.{statistic}", 0.0)


def test_a_name_that_only_ends_like_a_statistic_is_editable():
    assert is_editable("foo.hook_sink")


def test_a_statistic_without_a_float64_reference_does_not_pass_the_self_check(monkeypatch):
    monkeypatch.setattr(checks, "STATISTICS", (*STATISTICS, "hook_v"))
    with pytest.raises(RefusedModel, match=r"could not check it .KeyError: 'hook_v'"):
        checks.run_checks(lens_of("llama-gqa"), full=False)


def test_points_are_declared_once():
    names = [declared.name for declared in points._DECLARATIONS]
    assert len(names) == len(set(names))


def test_the_page_of_hook_points_lists_the_statistics_with_their_shapes():
    rows = re.findall(
        r"^\| `blocks\.\{i\}\.attn\.(\w+)` \| (\[.*?\]) \|", (ROOT / "docs" / "hooks.md").read_text(), re.M
    )
    assert sorted(rows) == sorted((name, declaration(f"attn.{name}").shape) for name in STATISTICS)


def test_a_declared_point_that_a_model_lacks_is_explained():
    with pytest.raises(
        InputError, match=r"no hook point 'blocks.0.hook_resid_mid'; only blocks that run attention"
    ):
        lens_of("cohere2").require_hook("blocks.0.hook_resid_mid")


@pytest.mark.parametrize("point", ["unembed.hook_out", "hook_unembed"])
def test_points_that_need_logits_fire_in_a_run(point):
    """`hook_unembed` is TransformerLens' other name for `unembed.hook_out`."""
    shapes: list[tuple[int, ...]] = []
    metric = probe(
        points=(point,), update=lambda self, layer: shapes.append(layer[point].shape), compute=lambda self: {}
    )
    phaselens.run(tiny_lens(), metrics=[metric], texts=["to be"], bos="never")
    assert [shape[-1] for shape in shapes] == [67]


def test_the_registry_needs_no_torch():
    code = "import sys, phaselens.lens.points; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
