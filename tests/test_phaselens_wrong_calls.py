"""Wrong calls of public callables and their error messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from phaselens import attention, data, patching, plugin, runs, spectrum, testing, uncertainty
from phaselens.plugin import TaskPrompt
from tests.public_calls import CELLS, LENS, LSE, METRIC, Q, X, call, tokens

NOT_PAIRS: list[Any] = [3, [(0, 1.5)], [(0, -1)], [(0, 8)], [(0, True)], [(0, 1, 2)], ["01"], [3]]
WRONG_CALLS: list[tuple[Callable[[], Any], str]] = [
    *(
        (lambda pairs=pairs: attention.pair_norms(CELLS, pairs), "expected (each of )?pairs as")
        for pairs in NOT_PAIRS
    ),
    (lambda: attention.pair_norms(CELLS, [(0, 1), (2, 1.5)]), r"dimensions from 0 to 7, received \(2, 1.5\)"),
    (lambda: attention.row_entropy(Q, Q, [1.0], scale=1.0), "expected lse as a tensor, received list"),
    (lambda: attention.attend(Q, Q, Q.numpy(), scale=1.0), "expected v as a tensor, received ndarray"),
    (lambda: attention.attend(Q, Q, Q, scale=1.0, mask=[[True]]), "expected mask as a tensor, received list"),
    (lambda: attention.summarise(Q, Q, LSE, scale=1.0, real=torch.ones(1, 4)), "real .* received torch.float32"),
    (lambda: attention.sink_mass(Q, Q, LSE, None, scale=1.0), "position as a whole number, received None"),
    (lambda: attention.norm_matrix(CELLS), r"states as a tensor \[pos, head, d_head\], received one of shape \(2, 8\)"),
    (lambda: attention.head_norms(torch.zeros(4, 2, 8), torch.zeros(1, 8, 8)), "expected factor of shape"),
    (lambda: attention.gaussian_massive_share([1.5], 5.0), r"n_tokens as a whole number .* received \[1.5\]"),
    (lambda: spectrum.bos_norm([1.0]), r"norms as a tensor \[pos\], received list"),
    (lambda: spectrum.bos_norm(X), r"norms as a tensor \[pos\], received one of shape \(4, 3\)"),
    (lambda: spectrum.compression_bound("3"), r"x as a tensor \[pos, d_model\], received a str"),
    (lambda: spectrum.row_norms(torch.tensor(1.0)), r"x as a tensor \[…, d_model\], received one of shape \(\)"),
    (lambda: spectrum.random_rows(3.0, 4), r"expected norms \[pos\], received shape \(\)"),
    (lambda: spectrum.gaussian_exceedance(1.5, 1.0, 1.0, 1.0), "n as a whole number"),
    (lambda: uncertainty.wilson_interval("3", 5), "successes as a whole number, received '3'"),
    (lambda: uncertainty.wilson_interval(True, 5), "successes as a whole number, received True"),
    (lambda: uncertainty.compare_arms([1.0, "2"], [[1.0], [2.0]]), "treated as an array of numbers"),
    (lambda: uncertainty.mean_interval([[1.0], [1.0, 2.0]]), "values as an array of numbers"),
    (lambda: uncertainty.mean_interval([1.0, 2.0], present=["no", "no"]), "present as an array of True and False"),
    (lambda: patching.align("a", "b"), "clean is a str, not a prompt"),
    (lambda: patching.stack(3), "sweeps as a list of Sweeps, received 3"),
    (lambda: patching.stack([3]), "each of sweeps as a Sweep from Experiment.sweep or attribution, received 3"),
    (lambda: patching.agreement(3, 4), "sweep_a as a Sweep from Experiment.sweep or attribution, received 3"),
    (lambda: patching.prompt("rope", "a"), r"lens as a lens made by phaselens.load\(model\), received 'rope'"),
    (lambda: plugin.interval_help(3), "over as text, received 3"),
    (lambda: TaskPrompt("a", None), "prompt 'a': its ids are None; give a list of token ids"),
    (lambda: runs.ModelSpec(3), "source as text, received 3"),
    (lambda: runs.ModelSpec.parse(3), "a model's name as text, received 3"),
    (lambda: runs.load_model("rope"), "spec as a ModelSpec such as ModelSpec.parse.*, received 'rope'"),
    (lambda: call(runs.applied, {"lens": LENS(), "condition": 3}), "its edits are the int 3; give a list of Edits"),
    (lambda: runs.feed_metric(LENS(), ["a"], METRIC(), [[0]]), "each of tokenized_texts .* TokenizedText .*'a'"),
    (lambda: runs.feed_metric(LENS(), tokens(), METRIC(), [0]), "each of batches as a list of whole numbers"),
    (lambda: data.pack(["a"], 3), "each of lengths as a whole number of at least 0, received 'a'"),
    (lambda: data.read_texts(3), "source as `bundled`, a file, a folder or `-`, received 3"),
    (lambda: testing.check_metric(3), "metric as a subclass of phaselens.plugin.Metric, received 3"),
    (lambda: testing.tiny_model("llama", hidden_size="32"), "LlamaConfig: .*'hidden_size' expected int, got str"),
    (lambda: LENS().stream(torch.tensor([[0, 5]]), stop_at_layer="1"), "stop_at_layer as a whole number, received '1'"),
    (lambda: LENS().stream(torch.tensor([[0, 5]]), stop_at_layer=1.5), "stop_at_layer as a whole number, received 1.5"),
    (lambda: LENS().stream(torch.tensor([[0, 5]]), [("hook_embed", 3)]), "a function for the hook point hook_embed"),
    (lambda: LENS().stream(torch.tensor([[0, 5]]), ["hook_embed"]), "each of hooks as a pair .name, function."),
    (lambda: LENS().stream(torch.tensor([[0, 5]]), 3), "hooks as a list of pairs .name, function., received 3"),
    (lambda: LENS().attention_replay("1"), "layer as a whole number, received '1'"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong_call", "message"), WRONG_CALLS, ids=range(len(WRONG_CALLS)))
def test_errors_name_the_expected_and_the_received_argument(
    wrong_call: Callable[[], Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        wrong_call()


def test_a_cached_result_is_not_reused_for_another_type() -> None:
    """True and 4.0 equal 1 and 4 as keys of a cache."""
    for function, valid, invalid in (
        (attention.uniform_sink, (4, True), (4.0, True)),
        (attention.uniform_sink, (4, True), (4, 1)),
        (attention.uniform_entropy, (1,), (True,)),
        (attention.gaussian_massive_share, (1, 5.0), (True, 5.0)),
        (spectrum.gaussian_max_ratio, (4,), (4.0,)),
    ):
        function(*valid)
        with pytest.raises(ValueError, match="expected"):
            function(*invalid)
