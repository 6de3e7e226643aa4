"""Edits of an experiment during generation: positions are absolute, with and without a cache."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from phaselens.errors import InputError
from phaselens.patching import Experiment
from phaselens.patching.plugin_metrics import find_condition
from phaselens.runs import applied
from tests.marks import mark_later_slow
from tests.patching.conftest import experiment_of

make_experiment = functools.partial(experiment_of, clean="to be or not", corrupt="to do or not")


def logits_of(
    experiment: Experiment, tokens: Tensor, chunks: list[int], *, cached: bool, mask: Tensor | None = None
) -> Tensor:
    model = experiment.lens.original_model
    options: dict[str, Any] = {
        "past_key_values": DynamicCache(config=model.config) if cached else None,
        "use_cache": cached,
    }
    logits, start = [], 0
    with torch.no_grad(), experiment.lens.hooks(fwd_hooks=experiment.hooks()):
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


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("name", EDITS)
def test_a_patched_prompt_decodes_as_one_forward_would(family, name):
    experiment = make_experiment(family)
    arguments = dict(EDITS[name])
    experiment.patch(arguments.pop("point", None), **arguments)
    n_prompt = len(experiment.clean)
    tokens = torch.cat([experiment.edited.tokens, torch.tensor([[20, 31, 7, 9]])], -1)
    n_tokens = tokens.shape[1]
    expected = logits_of(experiment, tokens, [n_tokens], cached=False)
    # Without decoded tokens, the logits are those of the experiment itself.
    prompt_logits = experiment.lens.stream(experiment.edited.tokens, experiment.hooks(), unembed=True)
    torch.testing.assert_close(expected[:, :n_prompt], prompt_logits, atol=1e-5, rtol=0)
    for chunks in ([n_prompt, 1, 1, 1, 1], [5, n_tokens - 5]):
        cached = logits_of(experiment, tokens, chunks, cached=True)
        torch.testing.assert_close(cached, expected, atol=1e-5, rtol=0)


def test_an_ablation_writes_to_its_positions_and_to_no_decoded_token():
    experiment = make_experiment()
    experiment.ablate("blocks.0.hook_mlp_out", pos=0)
    tokens = experiment.edited.tokens
    activations: list[Tensor] = []
    hooks = [
        *experiment.hooks(),
        ("blocks.0.hook_mlp_out", lambda value, hook: activations.append(value.clone())),
    ]
    with experiment.lens.hooks(fwd_hooks=hooks):
        experiment.lens.generate(tokens, max_new_tokens=3, do_sample=False, verbose=False, stop_at_eos=False)
    assert [value.shape[1] for value in activations] == [tokens.shape[1], 1, 1]
    assert bool((activations[0][:, 0] == 0).all())
    assert all(bool((value != 0).any()) for value in activations[1:])


ON_PADDED = {**EDITS, "a number": {"point": "blocks.1.hook_mlp_out", "pos": [0, 3], "value": 0.5}}
ON_PADDED["a mean"] = {"point": "blocks.0.attn.hook_v", "pos": [0, 3], "value": "mean"}


@pytest.mark.parametrize("name", ON_PADDED)
def test_pads_on_the_left_do_not_shift_an_edit(name):
    """Batches are generated with pads on the left; a position counts the tokens of the text."""
    experiment = make_experiment("mistral")
    arguments = dict(ON_PADDED[name])
    make = experiment.ablate if "value" in arguments else experiment.patch
    make(arguments.pop("point", None), **arguments)
    unpadded = torch.cat([experiment.edited.tokens, torch.tensor([[20, 31, 7]])], -1)
    n_tokens, n_pads = unpadded.shape[1], 5
    tokens = torch.cat(
        [torch.nn.functional.pad(unpadded, (n_pads, 0)), torch.arange(n_tokens + n_pads)[None]]
    )
    mask = torch.ones_like(tokens)
    mask[0, :n_pads] = 0
    expected = logits_of(experiment, unpadded, [n_tokens], cached=False)
    for chunks in ([n_tokens + n_pads], [3, 1, 4, n_tokens + n_pads - 9, 1]):
        if name == "a mean" and len(chunks) > 1:
            continue
        padded_logits = logits_of(experiment, tokens, chunks, cached=True, mask=mask)[:1, n_pads:]
        torch.testing.assert_close(padded_logits, expected, atol=1e-4, rtol=1e-4)


def test_a_mean_over_positions_needs_the_whole_text():
    experiment = make_experiment()
    experiment.ablate("blocks.0.attn.hook_k", value="mean")
    tokens = experiment.edited.tokens
    with pytest.raises(
        InputError, match=r"mean over positions needs the whole text.*use_past_kv_cache=False"
    ):
        logits_of(experiment, tokens, [5, tokens.shape[1] - 5], cached=True)


def test_a_condition_acts_at_its_positions_while_decoding():
    experiment = make_experiment()
    experiment.condition("bos-v", layer=1)
    tokens = torch.cat([experiment.edited.tokens, torch.tensor([[20, 31]])], -1)
    n_prompt = len(experiment.clean)
    uncached = logits_of(experiment, tokens, [n_prompt + 2], cached=False)
    cached = logits_of(experiment, tokens, [n_prompt, 1, 1], cached=True)
    torch.testing.assert_close(cached, uncached, atol=1e-5, rtol=0)


#: Metric, condition, layer.
CONDITIONS = [
    ("bos-v", "other position: all layers", None),
    ("combined", "write layer + top-1", None),
    ("layer-ablation", None, 1),
    ("bos-v", None, None),
    ("bos-mlp", None, None),
    *(
        ("qk-disruption", condition_name, None)
        for condition_name in ("top-1", "smallest", "top-1-random", "top-1-norm", "top-1-mean")
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "condition_name", "layer"), mark_later_slow(CONDITIONS, 3))
@pytest.mark.parametrize("family", mark_later_slow(["mistral", "gemma2", "gpt-oss"]))
def test_every_condition_decodes_past_a_window_as_without_a_cache(family, name, condition_name, layer):
    """This holds on a prompt, where only its tokens are edited, and on any text, where decoded ones are edited too."""
    experiment = make_experiment(family)
    tokens = torch.cat([experiment.edited.tokens, torch.tensor([[20, 31, 7, 9]])], -1)
    unedited = logits_of(experiment, tokens, [17], cached=False)
    condition = find_condition(experiment.lens, name, condition_name, layer, {})

    def require_same_with_a_cache() -> None:
        expected = logits_of(experiment, tokens, [17], cached=False)
        assert not torch.allclose(expected, unedited, atol=1e-4)
        for chunks in ([13, 1, 1, 1, 1], [5, *[1] * 7, 5]):  # the windows are 7
            cached = logits_of(experiment, tokens, chunks, cached=True)
            torch.testing.assert_close(cached, expected, atol=1e-5, rtol=0)

    if not condition.name.startswith("other position"):  # it is drawn for a text
        with applied(experiment.lens, condition):
            require_same_with_a_cache()
    experiment.condition(name, condition_name, layer=layer)
    require_same_with_a_cache()


def test_points_with_heads_before_positions_are_refused():
    """With equal numbers of tokens and heads, the two dimensions could not be distinguished."""
    experiment = make_experiment("gemma3")
    with pytest.raises(InputError, match=r"holds its heads before its positions.*hook_rot_q"):
        experiment.patch("blocks.1.attn.q_norm.hook_out")
