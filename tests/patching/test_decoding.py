"""Edits of an experiment while a text is generated: positions are absolute, with and without a cache."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from phaselens.errors import InputError
from phaselens.patching import Experiment
from phaselens.patching.named import find_condition
from phaselens.runs import applied
from tests.marks import first_quick
from tests.patching.conftest import experiment_of

experiment = functools.partial(experiment_of, clean="to be or not", corrupt="to do or not")


def logits_of(
    made: Experiment, tokens: Tensor, chunks: list[int], *, cached: bool, mask: Tensor | None = None
) -> Tensor:
    model = made.lens.original_model
    options: dict[str, Any] = {
        "past_key_values": DynamicCache(config=model.config) if cached else None,
        "use_cache": cached,
    }
    logits, start = [], 0
    with torch.no_grad(), made.lens.hooks(fwd_hooks=made.hooks()):
        for size in chunks:
            end = start + size
            if mask is not None:
                ids = (mask.cumsum(-1) - 1).clamp(min=1 - mask)
                options |= {"attention_mask": mask[:, :end], "position_ids": ids[:, start:end]}
            logits.append(model(tokens[:, start:end], **options).logits)
            start = end
    return torch.cat(logits, 1)


EDITS: dict[str, dict[str, Any]] = {
    "a position": {"point": "blocks.1.hook_resid_mid", "pos": [0, 4, -1]},
    "all of the prompt": {"point": "blocks.1.hook_mlp_out"},
    "a head": {"what": "head", "layer": 1, "head": [1], "pos": [2, 5]},
    "the pattern": {"what": "pattern", "layer": [0, 1], "head": [0, 2]},
    "rows of the pattern": {"what": "pattern", "layer": 1, "pos": [3, 9]},
    "the scores": {"point": "blocks.1.attn.hook_attn_scores", "pos": [3, 9]},
}


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("name", EDITS)
def test_a_patched_prompt_decodes_as_one_forward_would(family, name):
    made = experiment(family)
    arguments = dict(EDITS[name])
    made.patch(arguments.pop("point", None), **arguments)
    n_prompt = len(made.clean)
    tokens = torch.cat([made.edited.tokens, torch.tensor([[20, 31, 7, 9]])], -1)
    n_tokens = tokens.shape[1]
    expected = logits_of(made, tokens, [n_tokens], cached=False)
    # The prompt alone is patched as the experiment itself patches it.
    own = made.lens.stream(made.edited.tokens, made.hooks(), unembed=True)
    torch.testing.assert_close(expected[:, :n_prompt], own, atol=1e-5, rtol=0)
    for chunks in ([n_prompt, 1, 1, 1, 1], [5, n_tokens - 5]):
        cached = logits_of(made, tokens, chunks, cached=True)
        torch.testing.assert_close(cached, expected, atol=1e-5, rtol=0)


def test_an_ablation_writes_to_its_positions_and_to_no_decoded_token():
    made = experiment()
    made.ablate("blocks.0.hook_mlp_out", pos=0)
    tokens = made.edited.tokens
    seen: list[Tensor] = []
    hooks = [*made.hooks(), ("blocks.0.hook_mlp_out", lambda value, hook: seen.append(value.clone()))]
    with made.lens.hooks(fwd_hooks=hooks):
        made.lens.generate(tokens, max_new_tokens=3, do_sample=False, verbose=False, stop_at_eos=False)
    assert [value.shape[1] for value in seen] == [tokens.shape[1], 1, 1]
    assert bool((seen[0][:, 0] == 0).all())
    assert all(bool((value != 0).any()) for value in seen[1:])


ON_PADDED = {**EDITS, "a number": {"point": "blocks.1.hook_mlp_out", "pos": [0, 3], "value": 0.5}}
ON_PADDED["a mean"] = {"point": "blocks.0.attn.hook_v", "pos": [0, 3], "value": "mean"}


@pytest.mark.parametrize("name", ON_PADDED)
def test_pads_on_the_left_do_not_shift_an_edit(name):
    """A batch of prompts is generated from so: a position counts a text's own tokens."""
    made = experiment("mistral")
    arguments = dict(ON_PADDED[name])
    make = made.ablate if "value" in arguments else made.patch
    make(arguments.pop("point", None), **arguments)
    own = torch.cat([made.edited.tokens, torch.tensor([[20, 31, 7]])], -1)
    n_tokens, n_pads = own.shape[1], 5
    tokens = torch.cat([torch.nn.functional.pad(own, (n_pads, 0)), torch.arange(n_tokens + n_pads)[None]])
    mask = torch.ones_like(tokens)
    mask[0, :n_pads] = 0
    expected = logits_of(made, own, [n_tokens], cached=False)
    for chunks in ([n_tokens + n_pads], [3, 1, 4, n_tokens + n_pads - 9, 1]):
        if name == "a mean" and len(chunks) > 1:
            continue
        together = logits_of(made, tokens, chunks, cached=True, mask=mask)[:1, n_pads:]
        torch.testing.assert_close(together, expected, atol=1e-4, rtol=1e-4)


def test_a_mean_over_positions_needs_the_whole_text():
    made = experiment()
    made.ablate("blocks.0.attn.hook_k", value="mean")
    tokens = made.edited.tokens
    with pytest.raises(
        InputError, match=r"mean over positions needs the whole text.*use_past_kv_cache=False"
    ):
        logits_of(made, tokens, [5, tokens.shape[1] - 5], cached=True)


def test_a_condition_acts_at_its_positions_while_decoding():
    made = experiment()
    made.condition("bos-v", layer=1)
    tokens = torch.cat([made.edited.tokens, torch.tensor([[20, 31]])], -1)
    n_prompt = len(made.clean)
    whole = logits_of(made, tokens, [n_prompt + 2], cached=False)
    cached = logits_of(made, tokens, [n_prompt, 1, 1], cached=True)
    torch.testing.assert_close(cached, whole, atol=1e-5, rtol=0)


#: Of a metric, one of its conditions, in a layer.
CONDITIONS = [
    ("bos-v", "other position: all layers", None),
    ("combined", "write layer + top-1", None),
    ("layer-ablation", None, 1),
    ("bos-v", None, None),
    ("bos-mlp", None, None),
    *(
        ("qk-disruption", which, None)
        for which in ("top-1", "smallest", "top-1-random", "top-1-norm", "top-1-mean")
    ),
]


@pytest.mark.parametrize(("name", "which", "layer"), first_quick(CONDITIONS, 3))
@pytest.mark.parametrize("family", first_quick(["mistral", "gemma2", "gpt-oss"]))
def test_every_condition_decodes_past_a_window_as_without_a_cache(family, name, which, layer):
    """On a prompt, whose own tokens alone it edits, and on any text, where decoded tokens are edited too."""
    made = experiment(family)
    tokens = torch.cat([made.edited.tokens, torch.tensor([[20, 31, 7, 9]])], -1)
    plain = logits_of(made, tokens, [17], cached=False)
    condition = find_condition(made.lens, name, which, layer, {})

    def require_same_with_a_cache() -> None:
        expected = logits_of(made, tokens, [17], cached=False)
        assert not torch.allclose(expected, plain, atol=1e-4)
        for chunks in ([13, 1, 1, 1, 1], [5, *[1] * 7, 5]):  # the windows are 7
            cached = logits_of(made, tokens, chunks, cached=True)
            torch.testing.assert_close(cached, expected, atol=1e-5, rtol=0)

    if not condition.name.startswith("other position"):  # which is drawn for a text
        with applied(made.lens, condition):
            require_same_with_a_cache()
    made.condition(name, which, layer=layer)
    require_same_with_a_cache()


def test_points_with_heads_before_positions_are_refused():
    """With as many tokens as heads, the two could not be told apart."""
    made = experiment("gemma3")
    with pytest.raises(InputError, match=r"holds its heads before its positions.*hook_rot_q"):
        made.patch("blocks.1.attn.q_norm.hook_out")
