"""Prefill in chunks, decoding and padding on the left: every hook point shows what one forward of the text shows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, OlmoConfig, StaticCache

import phaselens
from phaselens.errors import InputError
from phaselens.lens.points import STATISTICS, is_editable
from phaselens.plugin import Edit, Site
from phaselens.runs import applied
from phaselens.testing import tiny_model
from phaselens.testing.models import FAMILIES
from tests.marks import mark_later_slow

N = 20  # longer than the tiny models' windows, which are 7
CHUNKS = ([5, 1, 14], [9, 4, 1, 3, 1, 1, 1])
MATRICES = ("hook_pattern", "hook_attn_scores")
INSIDE = ("hook_q", "hook_k", "hook_v", "hook_rot_q", "hook_rot_k", "hook_z")
RESIDUALS = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")
SLIDING_FIRST = mark_later_slow(
    ["mistral", "gpt-oss", "gemma2", "gpt-neox", *(f for f in FAMILIES if "drope" not in f)], 2
)


@functools.cache
def lens_of(family: str) -> phaselens.HookedTransformer:
    return phaselens.load(tiny_model(family, dtype=torch.float64), label=family, check=False)


def tokens_of(batch: int = 2, length: int = N) -> Tensor:
    return torch.randint(2, 67, (batch, length), generator=torch.Generator().manual_seed(3))


def pass_through(
    lens: phaselens.HookedTransformer,
    tokens: Tensor,
    chunks: list[int],
    points: tuple[str, ...],
    cache: Any,
    *,
    sink_position: int = 0,
    mask: Tensor | None = None,
    more_names: Sequence[str] = (),
    hooks: Sequence[tuple[str, Callable[..., Any]]] = (),
    is_own: Callable[[], bool] = lambda: True,
) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """Return logits, and by hook name the activations of each chunk at `points` in all layers and at
    `more_names`.

    Activations are recorded while `is_own` returns True; `hooks` run first.
    """
    activations: dict[str, list[Tensor]] = {}
    names = [
        name
        for layer in range(lens.info.n_layers)
        for point in points
        if lens.find_hook(name := f"blocks.{layer}.{point}") is not None
    ]
    names += more_names

    def keep(name: str) -> Any:
        def record(value: Tensor, hook: object) -> None:
            if is_own():
                activations.setdefault(name, []).append(value.detach().clone())

        return record

    logits, start = [], 0
    with (
        torch.no_grad(),
        lens.streaming(sink_position=sink_position),
        lens.hooks(fwd_hooks=[*hooks, *((name, keep(name)) for name in names)]),
    ):
        for size in chunks:
            options: dict[str, Any] = {"past_key_values": cache, "use_cache": cache is not None}
            if mask is not None:
                ids = (mask.long().cumsum(-1) - 1).masked_fill(~mask.bool(), 1)
                options |= {
                    "attention_mask": mask[:, : start + size],
                    "position_ids": ids[:, start : start + size],
                }
            logits.append(lens.original_model(tokens[:, start : start + size], **options).logits)
            start += size
    return torch.cat(logits, 1), activations


def joined(name: str, chunks: list[Tensor], length: int = N) -> Tensor:
    """Return the activations of all chunks, put together as one forward shows them."""
    point = name.rsplit(".", 1)[-1]
    if point in MATRICES:
        hidden = 0.0 if point == "hook_pattern" else -torch.inf
        wide = [
            torch.nn.functional.pad(chunk, (0, length - chunk.shape[-1]), value=hidden) for chunk in chunks
        ]
        return torch.cat(wide, 2)
    if point == "hook_received":
        return torch.stack(
            [torch.nn.functional.pad(chunk, (0, length - chunk.shape[-1])) for chunk in chunks]
        ).sum(0)
    if point == "hook_distance":
        return torch.stack(chunks).sum(0)
    return torch.cat(chunks, 2 if point in STATISTICS else 1)


def cache_of(cache_class: str, lens: phaselens.HookedTransformer) -> Any:
    config = lens.original_model.config
    return (
        DynamicCache(config=config)
        if cache_class == "dynamic"
        else StaticCache(config=config, max_cache_len=32)
    )


POINTS = {
    "streamed": tuple(f"attn.{point}" for point in STATISTICS),
    "with the matrix": tuple(f"attn.{point}" for point in (*MATRICES, *STATISTICS)),
    "the others": (*(f"attn.{point}" for point in INSIDE), *RESIDUALS),
}


@pytest.mark.slow
@pytest.mark.parametrize("cache_class", ["dynamic", "static"])
@pytest.mark.parametrize("points", POINTS)
@pytest.mark.parametrize("family", SLIDING_FIRST)
def test_cached_activations_equal_those_of_one_forward(family, points, cache_class):
    lens, tokens = lens_of(family), tokens_of()
    for sink_position in (0, 9) if points == "streamed" else (0,):
        logits, uncached = pass_through(lens, tokens, [N], POINTS[points], None, sink_position=sink_position)
        for chunks in CHUNKS:
            cached, by_chunk = pass_through(
                lens, tokens, chunks, POINTS[points], cache_of(cache_class, lens), sink_position=sink_position
            )
            torch.testing.assert_close(cached, logits, atol=1e-5, rtol=0)
            for name, (value,) in uncached.items():
                torch.testing.assert_close(joined(name, by_chunk[name]), value, atol=1e-5, rtol=0, msg=name)


#: First a family with experts, one with two rotations, and one with norms and no rotation; then all others.
UNUSUAL_FIRST = ["gpt-oss", "gemma3", "llama-drope-qk-norm-nope"]
UNUSUAL_FIRST += [family for family in FAMILIES if family not in UNUSUAL_FIRST]


def is_flattened(name: str) -> bool:
    """Return whether a mixture of experts has the point in the shape [batch · pos, …]."""
    return "router" in name or "expert" in name


def fired_points(lens: phaselens.HookedTransformer) -> dict[str, torch.dtype]:
    """Return every hook point that fires with a tensor in a forward with logits, and the tensor's dtype."""
    fired: dict[str, torch.dtype] = {}

    def note(name: str) -> Any:
        return lambda value, hook: fired.update({name: value.dtype}) if isinstance(value, Tensor) else None

    hooks = [(name, note(name)) for name in lens.hook_dict]
    lens.stream(tokens_of(), hooks, unembed=True)
    return fired


def require_same_chunks(
    lens: phaselens.HookedTransformer,
    name: str,
    uncached: list[Tensor],
    by_chunk: list[Tensor],
    sizes: list[int],
) -> None:
    """Compare the activations of chunks of these sizes with those of one forward."""
    for index, value in enumerate(uncached):  # Gemma 3's rotation fires once for each type of layer
        chunks = by_chunk[index :: len(uncached)]
        if name.rsplit(".", 1)[-1] in (*MATRICES, *STATISTICS):
            joined_chunks = joined(name, chunks)
        elif is_flattened(name):
            joined_chunks = torch.cat(
                [chunk.unflatten(0, (2, size)) for chunk, size in zip(chunks, sizes, strict=True)], 1
            )
            value = value.unflatten(0, (2, N))
        else:
            joined_chunks = torch.cat(chunks, lens.position_axis(name))
        if name == "hook_loss":  # a chunk's first token is predicted in the chunk before
            value = value.index_fill(1, torch.tensor([0, *sizes[:-1]]).cumsum(0), torch.nan)
        torch.testing.assert_close(
            joined_chunks, value, atol=1e-5, rtol=0, equal_nan=True, msg=f"{name}, chunks {sizes}"
        )


@pytest.mark.slow
@pytest.mark.parametrize("cache_class", ["dynamic", "static"])
@pytest.mark.parametrize("family", mark_later_slow(UNUSUAL_FIRST, 3))
def test_every_hook_point_shows_in_chunks_what_it_shows_in_one_forward(family, cache_class):
    """Covers the points inside MLPs, norms and projections, and outside of the layers."""
    lens = lens_of(family)
    names = list(fired_points(lens))
    assert {"hook_embed", "ln_final.hook_out", "unembed.hook_out", "blocks.0.mlp.hook_in"} <= set(names)
    attention_points = ("hook_in", "hook_out", "hook_attended", *STATISTICS)
    assert {f"blocks.1.attn.{point}" for point in attention_points} <= set(names)
    _, uncached = pass_through(lens, tokens_of(), [N], (), None, more_names=names)
    assert set(uncached) == set(names)
    for sizes in CHUNKS:
        _, by_chunk = pass_through(
            lens, tokens_of(), sizes, (), cache_of(cache_class, lens), more_names=names
        )
        assert by_chunk.keys() == uncached.keys()
        for name in names:
            require_same_chunks(lens, name, uncached[name], by_chunk[name], sizes)


@pytest.mark.parametrize("family", SLIDING_FIRST)
def test_a_prompt_padded_on_the_left_is_measured_as_without_pads(family):
    lens, n_pads = lens_of(family), 4
    tokens = tokens_of()
    without_pads = tokens[:1, n_pads:]
    mask = (torch.arange(N)[None] >= torch.tensor([[n_pads], [0]])).long()
    points = POINTS["streamed"]
    for sink_position in (0, 3):
        logits, unpadded = pass_through(
            lens, without_pads, [N - n_pads], points, None, sink_position=sink_position
        )
        for chunks in ([N], [10, 1, 1, 8]):
            cache = None if len(chunks) == 1 else cache_of("dynamic", lens)
            padded_logits, by_chunk = pass_through(
                lens, tokens, chunks, points, cache, sink_position=sink_position, mask=mask
            )
            torch.testing.assert_close(padded_logits[:1, n_pads:], logits, atol=1e-5, rtol=0)
            for name, (value,) in unpadded.items():
                padded = joined(name, by_chunk[name])[:1]
                if not name.endswith("hook_distance"):
                    padded = padded[:, :, n_pads:]
                torch.testing.assert_close(padded, value, atol=1e-5, rtol=0, msg=name)


def test_queries_of_pads_on_the_right_do_not_count():
    """A mask marks the end of a text, as `lengths` does."""
    lens, tokens = lens_of("llama"), tokens_of()
    mask = (torch.arange(N)[None] < torch.tensor([[12], [N]])).long()
    _, unpadded = pass_through(lens, tokens[:1, :12], [12], POINTS["streamed"], None)
    _, padded = pass_through(lens, tokens, [N], POINTS["streamed"], None, mask=mask)
    for name, (value,) in unpadded.items():
        real_rows = padded[name][0][:1, :, : value.shape[2]]
        torch.testing.assert_close(real_rows, value, atol=1e-5, rtol=0, msg=name)


def test_distances_across_a_hidden_token_are_refused():
    lens, tokens = lens_of("llama"), tokens_of()
    mask = torch.ones(2, N, dtype=torch.long)
    mask[0, 5] = 0
    with pytest.raises(InputError, match="hook_distance: the attention mask hides tokens"):
        pass_through(lens, tokens, [N], ("attn.hook_distance",), None, mask=mask)
    pass_through(lens, tokens, [N], ("attn.hook_sink",), None, mask=mask)


def test_the_sink_mass_is_zero_once_generation_has_left_the_window():
    """In `generate`, the sink's column leaves the sliding cache; its mass is 0 from then on."""
    lens, tokens = lens_of("mistral"), tokens_of(1, 5)
    sinks: list[Tensor] = []
    hook = ("blocks.0.attn.hook_sink", lambda sink, hook: sinks.append(sink))
    with lens.hooks(fwd_hooks=[hook]):
        text = lens.generate(tokens, max_new_tokens=10, do_sample=False, verbose=False, stop_at_eos=False)
    uncached: list[Tensor] = []
    lens.stream(text[:, :-1], [("blocks.0.attn.hook_sink", lambda sink, hook: uncached.append(sink))])
    torch.testing.assert_close(torch.cat(sinks, 2), uncached[0], atol=1e-5, rtol=0)
    assert bool((uncached[0][:, :, 7:] == 0).all())
    assert bool((uncached[0][:, :, :7] > 0).all())


@pytest.mark.parametrize("family", SLIDING_FIRST)
def test_transformers_generates_with_a_static_cache(family):
    """transformers then builds the masks, and only positions mark the pads; a prompt without pads gets no mask."""
    lens, n_pads = lens_of(family), 4
    prompts = tokens_of(2, 12)
    mask = (torch.arange(12)[None] >= torch.tensor([[n_pads], [0]])).long()
    options: dict[str, Any] = {
        "max_new_tokens": 4,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 1,
    }
    for sink_position in (0, 2):
        by_token: dict[str, list[Tensor]] = {}
        names = [f"blocks.{layer}.{point}" for layer in range(2) for point in POINTS["streamed"]]

        def keep(name: str, statistics: dict[str, list[Tensor]] = by_token) -> Any:
            return lambda statistic, hook: statistics.setdefault(name, []).append(statistic.clone())

        generate = lens.original_model.generate
        with lens.streaming(sink_position=sink_position), lens.hooks([(name, keep(name)) for name in names]):
            texts = generate(prompts, attention_mask=mask, cache_implementation="static", **options)
        assert texts[1:].tolist() == generate(prompts[1:], cache_implementation="static", **options).tolist()
        for row, start in ((0, n_pads), (1, 0)):
            text = texts[row : row + 1, start:-1]
            _, uncached = pass_through(
                lens, text, [text.shape[1]], POINTS["streamed"], None, sink_position=sink_position
            )
            for name, (value,) in uncached.items():
                generated = joined(name, by_token[name], 15)[row : row + 1]
                if not name.endswith("hook_distance"):
                    generated = generated[:, :, start:]
                torch.testing.assert_close(generated, value, atol=1e-5, rtol=0, msg=name)


def test_an_edit_cannot_bring_back_a_key_that_has_left_the_cache():
    lens, tokens = lens_of("mistral"), tokens_of()
    cache = cache_of("dynamic", lens)

    def uniform(pattern: Tensor, hook: object) -> Tensor:
        return torch.full_like(pattern, 1 / pattern.shape[-1])

    with torch.no_grad():
        lens.original_model(tokens[:, :12], past_key_values=cache)
        with (
            lens.hooks(fwd_hooks=[("blocks.0.attn.hook_pattern", uniform)]),
            pytest.raises(InputError, match=r"hook_pattern.*left this layer's sliding cache.*last 7 keys"),
        ):
            lens.original_model(tokens[:, 12:13], past_key_values=cache)


LOGITS = ("unembed", "hook_unembed")


def editable_points(lens: phaselens.HookedTransformer) -> list[str]:
    """Return the points of layer 1 and outside of the layers that can be edited at positions."""
    return [
        name
        for name, dtype in fired_points(lens).items()
        if dtype.is_floating_point
        and is_editable(name)
        and not is_flattened(name)
        and (name.startswith("blocks.1.") or not name.startswith(("blocks.", *LOGITS)))
    ]


def changed(tensor: Tensor, site: Site) -> Tensor:
    """Return an edit that keeps hidden scores hidden, and attention between 0 and 1."""
    if site.point.endswith("hook_pattern"):
        return tensor * 0.5
    return torch.where(tensor.isfinite(), 1.5 * tensor + 0.1, tensor)


def decoded(lens: phaselens.HookedTransformer, edits: list[Edit], chunks: list[int], cache: Any) -> Tensor:
    with applied(lens, edits):
        return pass_through(lens, tokens_of(), chunks, (), cache)[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:A forward hook edited hook_scale")  # TransformerLens warns of rounding
@pytest.mark.parametrize("family", FAMILIES)
def test_every_edit_does_the_same_with_a_cache(family):
    lens = lens_of(family)
    points = editable_points(lens)
    assert {"blocks.1.attn.hook_rot_k", "blocks.1.attn.hook_pattern", "blocks.1.hook_mlp_out"} <= set(points)
    for point in points:
        # Edits of all rows and of the first row run the same code in a DroPE model as in its base model.
        for positions in ([2, 9],) if "drope" in family else (None, [0], [2, 9]):
            edits = [Edit(point, changed, positions)]
            expected = decoded(lens, edits, [N], None)
            for chunks in ([10, 1, 1, 1, 7], [5, 15]):
                cached = decoded(lens, edits, chunks, cache_of("dynamic", lens))
                message = f"{point} at {positions}, chunks {chunks}"
                torch.testing.assert_close(cached, expected, atol=1e-5, rtol=0, msg=message)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:A forward hook edited hook_scale")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_edit_of_attention_does_the_same_with_a_static_cache(family):
    """At points with heads, the edit is of the last head."""
    lens = lens_of(family)
    n_heads = dict.fromkeys((*INSIDE, *MATRICES, "hook_attended"), lens.info.n_heads)
    n_heads |= dict.fromkeys(("hook_k", "hook_v", "hook_rot_k"), lens.info.n_kv_heads)
    for point in (name for name in editable_points(lens) if name.startswith("blocks.1.attn.")):
        short_name = point.rsplit(".", 1)[-1]
        edits = [Edit(point, changed, [2, 9], [n_heads[short_name] - 1] if short_name in n_heads else None)]
        expected = decoded(lens, edits, [N], None)
        cached = decoded(lens, edits, [9, 11], cache_of("static", lens))
        torch.testing.assert_close(cached, expected, atol=1e-5, rtol=0, msg=point)


#: Points of a router that TransformerLens fires, and on which nothing in the model depends.
READ_ONLY = ("router.hook_out", "hook_router_scores", "hook_expert_indices")


@pytest.mark.parametrize("family", mark_later_slow(UNUSUAL_FIRST))
def test_hooks_on_experts_and_logits_do_the_same_with_a_cache(family):
    """TransformerLens' own hooks can change these points, a condition cannot."""
    lens = lens_of(family)
    points = [
        name
        for name in fired_points(lens)
        if name.startswith(LOGITS) or (name.startswith("blocks.1.") and is_flattened(name))
    ]
    assert {"unembed.hook_in", "unembed.hook_out", "hook_unembed"} <= set(points)
    assert ("blocks.1.mlp.hook_expert_weights" in points) == (family == "gpt-oss")
    unedited = decoded(lens, [], [N], None)

    def change(value: Tensor, hook: object) -> Tensor:
        return 1.5 * value + 0.1 if value.is_floating_point() else value.flip(-1)

    for point in points:
        with lens.hooks(fwd_hooks=[(point, change)]):
            expected = decoded(lens, [], [N], None)
            cached = decoded(lens, [], [10, 1, 1, 1, 7], cache_of("dynamic", lens))
        torch.testing.assert_close(cached, expected, atol=1e-5, rtol=0, msg=point)
        assert torch.allclose(expected, unedited) == point.endswith(READ_ONLY), point
        with pytest.raises(InputError, match=f"edit of {point}: "):
            decoded(lens, [Edit(point, changed, [2])], [N], None)


GENERATED = ("attn.hook_rot_k", "attn.hook_v", "attn.hook_pattern", "hook_resid_mid", "hook_mlp_out")


@pytest.mark.parametrize("family", mark_later_slow(UNUSUAL_FIRST))
def test_edits_do_the_same_in_generation_with_and_without_a_cache(family):
    """The edits are at the first token, within the prompt and at a generated token."""
    lens = lens_of(family)
    points = [name for point in GENERATED if (name := f"blocks.1.{point}") in editable_points(lens)]
    assert len(points) >= 4

    def generated(edits: list[Edit], use_past_kv_cache: bool) -> tuple[Tensor, Tensor]:
        rows: list[Tensor] = []
        last_row = ("unembed.hook_out", lambda logits, hook: rows.append(logits[:, -1].clone()))
        with applied(lens, edits), lens.hooks(fwd_hooks=[last_row]):
            tokens = lens.generate(
                tokens_of(2, 9), max_new_tokens=5, do_sample=False, stop_at_eos=False, verbose=False,
                use_past_kv_cache=use_past_kv_cache,
            )  # fmt: skip
        return tokens, torch.stack(rows, 1)

    _, unedited = generated([], True)
    for point in points:
        edits = [Edit(point, changed, [0, 5, 11], [0] if ".attn." in point else None)]
        expected, logits = generated(edits, False)
        tokens, cached = generated(edits, True)
        assert torch.equal(tokens, expected), point
        torch.testing.assert_close(cached, logits, atol=1e-5, rtol=0, msg=point)
        assert not torch.allclose(logits, unedited, atol=1e-4), point


@pytest.mark.filterwarnings("ignore:A forward hook edited hook_scale")
@pytest.mark.parametrize("point", ["hook_normalized", "hook_scale"])
def test_edits_inside_a_norm_without_weights_do_the_same_with_a_cache(point):
    """The norms are OLMo's."""
    config = OlmoConfig(
        vocab_size=67, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=None, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    lens = phaselens.load(AutoModelForCausalLM.from_config(config).double(), check=False)
    copied = lens.stream(tokens_of(), [("ln_final.hook_scale", lambda scale, hook: scale.clone())])
    torch.testing.assert_close(copied, lens.stream(tokens_of()), atol=1e-5, rtol=0)
    edits = [Edit(f"blocks.1.ln1.{point}", changed, [2, 9])]
    expected = decoded(lens, edits, [N], None)
    assert not torch.allclose(expected, decoded(lens, [], [N], None), atol=1e-4)
    cached = decoded(lens, edits, [10, 1, 9], cache_of("dynamic", lens))
    torch.testing.assert_close(cached, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["gpt-neox", "mistral"])
def test_edits_of_keys_do_the_same_while_decoding(family):
    """GPT-NeoX passes its cache under another name than most."""
    lens = lens_of(family)
    edits = [Edit("blocks.0.attn.hook_rot_k", changed, [0, 7, 15])]
    expected = decoded(lens, edits, [N], None)
    cached = decoded(lens, edits, [10] + [1] * 10, cache_of("dynamic", lens))
    torch.testing.assert_close(cached, expected, atol=1e-5, rtol=0)


def test_an_interrupted_forward_is_forgotten():
    """PyTorch runs no hook after a KeyboardInterrupt, so the call would seem to be running still."""
    lens, tokens = lens_of("llama"), tokens_of()

    def interrupt(value: Tensor, hook: object) -> None:
        raise KeyboardInterrupt

    for run in (lens.stream, lens):
        with lens.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", interrupt)]), pytest.raises(KeyboardInterrupt):
            run(tokens)
        assert not lens.rows.running


def test_an_interrupted_generation_or_probe_is_forgotten():
    from phaselens.lens.checks import run_checks
    from phaselens.lens.head_outputs import read_head_outputs
    from phaselens.lens.rotation import detect_rotation
    from phaselens.lens.rotation_pairs import read_rotated_pairs
    from phaselens.lens.visibility import measure_windows
    from phaselens.testing import tiny_tokenizer

    lens = phaselens.load(tiny_model("llama"), tokenizer=tiny_tokenizer())
    tokens = tokens_of(2, 4)

    def interrupt(value: Tensor, hook: object) -> None:
        raise KeyboardInterrupt

    options: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False}
    runs: list[Any] = [
        lambda: lens.hf_generate(tokens, **options),
        lambda: lens.hf_generate(["to be", "or"], **options),
        lambda: lens.generate(tokens, verbose=False, **options),
        lambda: list(lens.generate_stream(tokens, verbose=False, **options)),
        lambda: detect_rotation(lens),
        lambda: read_rotated_pairs(lens, lens.info.positions),
        lambda: measure_windows(lens),
        lambda: read_head_outputs(lens),
        lambda: run_checks(lens),
    ]
    received: list[Tensor] = []
    measured = [("blocks.0.attn.hook_received", lambda value, hook: received.append(value))]
    for run in (None, *runs):
        if run is not None:
            with lens.hooks(fwd_hooks=[("blocks.1.hook_in", interrupt)]), pytest.raises(KeyboardInterrupt):
                run()
            assert not lens.rows.running
        with torch.no_grad(), lens.streaming(lengths=torch.tensor([4, 2])), lens.hooks(fwd_hooks=measured):
            lens(tokens)
    assert torch.equal(received[0].sum(-1).round(), torch.tensor([[4.0], [2.0]]).expand(2, 4))
    assert all(torch.equal(later, received[0]) for later in received[1:])
