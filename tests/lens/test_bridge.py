"""TransformerLens' names, edits and caches on the lens, and the corrections to them."""

from __future__ import annotations

import pytest
import torch
from transformer_lens import ActivationCache
from transformer_lens.hook_points import HookPoint

import phaselens
from phaselens.lens.checks import capture
from phaselens.lens.points import OWN_ATTENTION_POINTS
from phaselens.testing import tiny_model
from tests.lens.conftest import LENGTH, by_distance, lens_of
from tests.marks import mark_later_slow


def test_the_lens_is_a_transformer_lens_bridge(tokens):
    from transformer_lens.model_bridge import TransformerBridge

    lens = lens_of("llama-gqa")
    assert isinstance(lens, TransformerBridge)
    assert isinstance(lens, phaselens.HookedTransformer)
    logits, cache = lens.run_with_cache(tokens)
    assert isinstance(cache, ActivationCache)
    assert cache["blocks.1.attn.hook_pattern"].shape == (2, 4, 24, 24)
    assert cache["blocks.0.attn.hook_q"].shape == (2, 24, 4, 8)
    assert cache["blocks.0.attn.hook_k"].shape == (2, 24, 2, 8)
    assert cache["blocks.0.attn.hook_rot_k"].shape == (2, 24, 2, 8)
    assert cache["blocks.0.attn.hook_z"].shape == (2, 24, 4, 8)
    with torch.no_grad():
        torch.testing.assert_close(logits, lens(tokens), atol=2e-5, rtol=1e-5)


def test_the_matrix_is_built_only_in_the_layer_that_is_hooked(tokens, monkeypatch):
    from phaselens import attention

    calls = []
    explicit = attention.explicit_scores
    monkeypatch.setattr(attention, "explicit_scores", lambda *a, **k: calls.append(1) or explicit(*a, **k))
    lens = lens_of("llama-gqa")
    capture(lens, tokens, {i: f"blocks.{i}.attn.hook_{s}" for i, s in enumerate(("sink", "entropy"))})
    assert calls == []
    capture(lens, tokens, {0: "blocks.1.attn.hook_pattern"})
    assert calls == [1]


def test_scores_and_pattern_edits_reach_the_output(tokens):
    lens = lens_of("llama")

    def hide_first_key(scores, hook):
        return scores.index_fill(-1, torch.tensor([0]), -torch.inf).masked_fill(
            torch.arange(24)[None, None, :, None] == 0, 0.0
        )

    hooks = [("blocks.1.attn.hook_attn_scores", hide_first_key)]
    activations = {}
    keep = [
        (f"blocks.1.attn.{p}", lambda v, hook, p=p: activations.update({p: v}))
        for p in ("hook_sink", "hook_pattern")
    ]
    with torch.no_grad():
        unedited = lens(tokens)
        edited = lens.run_with_hooks(tokens, fwd_hooks=[*hooks, *keep])
    assert (edited - unedited).abs().max() > 1e-3
    assert activations["hook_pattern"][:, :, 1:, 0].abs().max() == 0
    assert activations["hook_sink"][:, :, 1:].abs().max() == 0


def test_a_statistic_cannot_be_edited(tokens):
    with pytest.raises(phaselens.InputError, match="hook_sink: a hook returned a new value"):
        lens_of("llama").stream(tokens, [("blocks.0.attn.hook_sink", lambda value, hook: value * 0)])


@pytest.mark.slow
def test_start_at_layer_skips_the_layers_below(tokens):
    lens = lens_of("llama", num_hidden_layers=4)
    with torch.no_grad():
        logits, cache = lens.run_with_cache(tokens)
        layers_run = []
        for layer in range(4):
            lens.blocks[layer].attn.original_component.register_forward_hook(
                lambda *_args, layer=layer: layers_run.append(layer)
            )
        resumed = lens(cache["blocks.2.hook_resid_pre"], start_at_layer=2)
    assert layers_run == [2, 3]
    torch.testing.assert_close(resumed, logits, atol=2e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", mark_later_slow(["llama", "gemma2", "olmo2", "gpt2"], 2))
def test_an_edit_of_resid_mid_reaches_the_skip_path(family, tokens):
    lens = lens_of(family)
    shift = torch.zeros(32)
    shift[3] = 5.0
    name = "blocks.1.hook_resid_mid"
    points = {"mid": name, "mlp": "blocks.1.hook_mlp_out", "out": "blocks.1.hook_out"}
    _, clean = capture(lens, tokens, points)
    edited = {}
    recorders = [
        (point, lambda v, hook, key=key: edited.update({key: v}))
        for key, point in points.items()
        if key != "mid"
    ]
    lens.stream(tokens, [(name, lambda v, hook: v + shift), *recorders])
    assert torch.equal(edited["out"], clean["mid"] + shift + edited["mlp"])
    assert (edited["mlp"] - clean["mlp"]).abs().max() > 0
    in_place = {}

    def add_in_place(value, hook):
        value += shift

    lens.stream(tokens, [(name, add_in_place), (points["out"], lambda v, hook: in_place.update(out=v))])
    torch.testing.assert_close(in_place["out"], edited["out"])


@pytest.mark.parametrize("family", mark_later_slow(["gpt2", "llama-gqa", "phi3", "gpt-neox"], 2))
def test_an_edit_of_q_k_or_v_changes_what_the_heads_read(family, tokens):
    """This also holds for families that fuse the three projections; an edit of v scales what the heads read."""
    lens = lens_of(family)
    for point in ("hook_q", "hook_k", "hook_v"):
        shapes = {}

        def double(value, hook, point=point, shapes=shapes):
            shapes[point] = value.shape
            return 2 * value

        doubled, clean = capture(lens, tokens, {"z": "blocks.0.attn.hook_z"})
        edited = {}
        lens.stream(
            tokens,
            [
                (f"blocks.0.attn.{point}", double),
                ("blocks.0.attn.hook_z", lambda v, hook, z=edited: z.update(z=v)),
            ],
        )
        n_heads = lens.info.n_heads if point == "hook_q" else lens.info.n_kv_heads
        assert shapes[point] == (2, 24, n_heads, lens.info.d_head)
        if point == "hook_v":
            torch.testing.assert_close(edited["z"], 2 * clean["z"], atol=2e-5, rtol=1e-5)
        else:
            assert (edited["z"] - clean["z"]).abs().max() > 1e-4
        assert doubled.shape == (2, 24, 32)


def test_cached_decoding_measures_the_new_row_only(tokens):
    """With a KV cache, the statistics of each new query equal that row's in one forward of the complete text."""
    lens = lens_of("llama-gqa")
    point = "blocks.1.attn.hook_sink"
    _, uncached = capture(lens, tokens, {"sink": point})
    rows = []
    with torch.no_grad(), lens.hooks(fwd_hooks=[(point, lambda sink, hook: rows.append(sink.clone()))]):
        _, cache = lens(tokens[:, :20], return_type="logits_and_cache", use_past_kv_cache=True)
        for i in range(20, 24):
            _, cache = lens(tokens[:, i : i + 1], past_key_values=cache, return_type="logits_and_cache")
    assert [row.shape[-1] for row in rows] == [20, 1, 1, 1, 1]
    torch.testing.assert_close(torch.cat(rows, dim=-1), uncached["sink"], atol=1e-5, rtol=0)


def test_an_edit_of_rot_k_is_stored_once_in_the_cache(tokens):
    """Each key is edited when it is new, and not again when later tokens read it from the cache."""
    lens = lens_of("llama-gqa")

    def halve(key, hook):
        return 0.5 * key

    hooks = [(f"blocks.{i}.attn.hook_rot_k", halve) for i in range(2)]
    with torch.no_grad(), lens.hooks(fwd_hooks=hooks):
        uncached = lens(tokens)
        _, cache = lens(tokens[:, :20], return_type="logits_and_cache", use_past_kv_cache=True)
        cached = []
        for i in range(20, 24):
            logits, cache = lens(tokens[:, i : i + 1], past_key_values=cache, return_type="logits_and_cache")
            cached.append(logits)
    torch.testing.assert_close(torch.cat(cached, dim=1), uncached[:, 20:], atol=2e-5, rtol=1e-5)


def test_left_padding_with_a_mask_is_served(tokens):
    lens = lens_of("llama-gqa")
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    padded = {}
    with (
        torch.no_grad(),
        lens.hooks(fwd_hooks=[("blocks.1.attn.hook_entropy", lambda v, hook: padded.update(h=v))]),
    ):
        lens(tokens, attention_mask=mask)
    _, unpadded = capture(lens, tokens[:1, 5:], {"h": "blocks.1.attn.hook_entropy"})
    torch.testing.assert_close(padded["h"][:1, :, 5:], unpadded["h"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", mark_later_slow(["llama", "gemma2", "gpt-oss"]))
def test_gradients_flow_and_a_statistic_has_none(family, tokens):
    lens = lens_of(family)
    sinks = []
    with lens.hooks(fwd_hooks=[("blocks.0.attn.hook_sink", lambda v, hook: sinks.append(v))]):
        loss = lens(tokens, return_type="loss")
    loss.backward()
    gradient = lens.original_model.get_input_embeddings().weight.grad
    assert gradient.abs().sum() > 0
    lens.zero_grad()
    assert not sinks[0].requires_grad
    with lens.hooks(fwd_hooks=[("blocks.0.attn.hook_pattern", lambda v, hook: sinks.append(v))]):
        lens(tokens)
    assert sinks[1].requires_grad


def test_a_gradient_of_the_values_alone_is_kept(tokens):
    """Weights are frozen, an edit of the values needs a gradient, and a statistic is hooked."""
    lens = phaselens.load(tiny_model("llama"))
    lens.original_model.requires_grad_(False)
    shift = torch.zeros(8, requires_grad=True)
    hooks = [
        ("blocks.1.attn.hook_v", lambda v, hook: v + shift),
        ("blocks.1.attn.hook_sink", lambda v, hook: None),
    ]
    lens.run_with_hooks(tokens, fwd_hooks=hooks).sum().backward()
    assert shift.grad.abs().sum() > 0


def test_generate_and_patching_work(tokens):
    from transformer_lens import patching

    lens = lens_of("llama-gqa")
    assert (
        lens.generate(
            tokens[:1], max_new_tokens=3, do_sample=False, verbose=False, return_type="tokens"
        ).shape[1]
        >= 25
    )
    _, cache = lens.run_with_cache(tokens[:1])
    corrupted = tokens[:1].clone()
    corrupted[0, 4] = 9
    with torch.no_grad():
        patched = patching.get_act_patch_resid_pre(lens, corrupted, cache, lambda logits: logits[0, -1, 3])
    assert patched.shape == (2, 24)
    assert patched[0, 4] == pytest.approx(float(lens(tokens[:1])[0, -1, 3].detach()), abs=1e-4)


def test_compatibility_mode_keeps_the_logits_and_refuses_the_statistics(tokens):
    lens = phaselens.load(tiny_model("llama"), label="compat")
    with torch.no_grad():
        expected = lens(tokens).log_softmax(-1)
        lens.enable_compatibility_mode()
        torch.testing.assert_close(lens(tokens).log_softmax(-1), expected, atol=1e-3, rtol=1e-3)
    with pytest.raises(phaselens.RefusedModel, match="hook_sink cannot be served under compatibility mode"):
        lens.stream(tokens, [("blocks.0.attn.hook_sink", lambda v, hook: None)])


def test_a_point_of_the_models_own_attention_is_refused_if_that_does_not_run(tokens):
    lens = phaselens.load(tiny_model("llama"), check=False)
    lens.set_use_attn_result(True)
    name = "blocks.0.attn.hook_attended"
    with pytest.raises(phaselens.RefusedModel, match="hook_attended cannot be served under use_attn_result"):
        lens.stream(tokens, [(name, lambda value, hook: 0 * value)])
    assert name not in lens.run_with_cache(tokens)[1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:run_with_cache. skipped .* gated-off hook")
@pytest.mark.parametrize(
    "option", ["use_attn_result", "use_split_qkv_input", "use_attn_in", "use_hook_mlp_in"]
)
@pytest.mark.parametrize("family", mark_later_slow(["llama", "gpt-neox", "gemma2"]))
def test_a_cache_of_everything_holds_what_a_cache_of_all_names_holds(family, option, tokens):
    """This holds for each option of TransformerLens. Those that replace the model's attention have no statistics."""
    lens = phaselens.load(tiny_model(family), check=False)
    getattr(lens, f"set_{option}")(True)
    cached_names = set(lens.run_with_cache(tokens)[1])
    assert cached_names == set(lens.run_with_cache(tokens, names_filter=list(lens.hook_dict))[1])
    assert any(
        name.endswith(("hook_result", "_input", "hook_attn_in", "hook_mlp_in")) for name in cached_names
    )
    served = {point for point in OWN_ATTENTION_POINTS if f"blocks.1.attn.{point}" in cached_names}
    assert served == (set(OWN_ATTENTION_POINTS) if option == "use_hook_mlp_in" else set())


def test_stream_leaves_no_hook_behind(tokens):
    lens = lens_of("llama")
    point = lens.require_hook("blocks.0.attn.hook_sink")
    assert isinstance(point, HookPoint)

    def fail(value, hook):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        lens.stream(tokens, [("blocks.0.attn.hook_sink", fail)])
    assert not point._forward_hooks
    assert not point.fwd_hooks


def test_stream_stops_before_a_layer(tokens):
    lens = lens_of("llama")
    residual = lens.stream(tokens, stop_at_layer=1)
    _, activations = capture(lens, tokens, {"in": "blocks.1.hook_in"})
    assert torch.equal(residual, activations["in"])
    assert lens.stream(tokens).shape == (2, 24, 32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"tokens": torch.zeros(1, 0, dtype=torch.long)}, "at least one id"),
        ({"tokens": torch.tensor([[3, 67]])}, "has 0 to 66"),
        ({"tokens": torch.tensor([[-1]])}, "ids from -1"),
        ({"tokens": torch.tensor([3])}, r"expected tokens as a tensor \[batch, pos\] of ids"),
        (
            {"tokens": torch.tensor([[3]]), "hooks": [("blocks.0.attn.hook_sinc", None)]},
            "did you mean .*hook_sink",
        ),
        ({"tokens": torch.tensor([[3]]), "start_at_layer": 1}, "residual"),
        ({"tokens": torch.tensor([[3]]), "stop_at_layer": 9}, "has 2 layers"),
        ({"tokens": torch.tensor([[3]]), "sink_position": -1}, "counted from 0"),
    ],
)
def test_wrong_input_is_refused_by_name(call, message):
    with pytest.raises(phaselens.InputError, match=message):
        lens_of("llama").stream(**call)


def test_texts_longer_than_the_learned_positions_are_refused():
    lens = lens_of("gpt2")
    with pytest.raises(phaselens.InputError, match="learned positions for 128"):
        lens.stream(torch.zeros(1, 129, dtype=torch.long))


def test_the_sink_can_be_at_any_position(tokens):
    lens = lens_of("mistral")
    streamed = {}
    lens.stream(tokens, [("blocks.0.attn.hook_sink", lambda v, hook: streamed.update(s=v))], sink_position=3)
    _, dense = capture(lens, tokens, {"p": "blocks.0.attn.hook_pattern"})
    torch.testing.assert_close(streamed["s"], dense["p"][..., 3], atol=1e-6, rtol=0)
    assert streamed["s"][..., 10:].abs().max() == 0  # outside of the window


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mistral", "gpt-oss"])
@pytest.mark.parametrize("n", [1, 5, LENGTH, 2 * LENGTH])
def test_any_number_of_distances_is_exact_with_and_without_the_matrix(tokens, family, n):
    lens, point = lens_of(family), "blocks.0.attn.hook_distance"
    options = {"lengths": torch.tensor([LENGTH, 7]), "n_distances": n}
    _, streamed = capture(lens, tokens, {"d": point}, **options)
    _, dense = capture(lens, tokens, {"d": point, "p": "blocks.0.attn.hook_pattern"}, **options)
    pattern = dense["p"].double()
    pattern[1, :, 7:] = 0.0  # pads' queries do not count
    expected = by_distance(pattern, n)
    for distances in (streamed["d"], dense["d"]):
        assert distances.shape == (2, 4, n)
        torch.testing.assert_close(distances.double(), expected, atol=1e-5, rtol=0)
    with pytest.raises(phaselens.InputError, match="at least 1"):
        lens.stream(tokens, n_distances=0)


@pytest.mark.parametrize("point", ["hook_attn_scores", "hook_pattern"])
def test_a_hooked_matrix_is_the_same_under_inference_mode(tokens, point):
    lens = lens_of("llama-gqa")
    name = f"blocks.0.attn.{point}"

    def run(hook, **options):
        matrices = []
        hooks = [(name, lambda matrix, hook: matrices.append(matrix.clone())), (name, hook)]
        return [lens.stream(tokens, hooks, **options), *matrices]

    def edit_in_place(matrix, hook):
        matrix[..., 5:, 1] *= 0.5

    for hook in (lambda matrix, hook: None, lambda matrix, hook: matrix * 0.5, edit_in_place):
        expected = run(hook)
        with torch.inference_mode():
            assert all(map(torch.equal, run(hook), expected))
            # Writes by a hook cannot be detected here, so the layer is computed from the matrix.
            assert torch.equal(run(hook, reads_only=True)[0], expected[0])
    _, cache = lens.run_with_cache(tokens)
    with torch.inference_mode():
        _, inferred = lens.run_with_cache(tokens)
    assert torch.equal(inferred[name], cache[name])


def test_hooks_may_come_from_a_generator():
    shapes = []
    hooks = ((name, lambda tensor, hook: shapes.append(tuple(tensor.shape))) for name in ("hook_embed",))
    phaselens.load(tiny_model("llama"), check=False).stream(torch.tensor([[0, 5]]), hooks)
    assert shapes == [(1, 2, 32)]
